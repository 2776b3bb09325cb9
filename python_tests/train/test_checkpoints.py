import io
import shutil

import pytest
from rich.console import Console

from dflash_ext.train import Recipe, train_drafter
from dflash_ext.train.checkpoints import newest_checkpoint
from dflash_ext.train.objectives import DFlashObjective
from python_tests.tiny import tiny_pair
from python_tests.train.test_training import Cycles

FILES = ["objective.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with checkpoints at steps 9 and 10, and its objective."""
    folder = tmp_path_factory.mktemp("run")
    target, drafter = tiny_pair("llama")
    for steps in (9, 10):
        recipe = Recipe(steps=steps, batch_size=4, anchors=4, save_every=steps, log_every=1)
        train_drafter(drafter, target, Cycles(64), folder / str(steps), recipe)
        (folder / str(steps) / f"checkpoint-{steps}").rename(folder / f"checkpoint-{steps}")
    return folder, DFlashObjective(drafter, target)


def test_the_newest_is_that_with_the_most_steps(run, tmp_path):
    folder, objective = run
    assert newest_checkpoint(folder, objective) == folder / "checkpoint-10"
    assert newest_checkpoint(tmp_path, objective) is None
    assert newest_checkpoint(tmp_path / "nowhere", objective) is None


# Without torchrun's option there is one file of random states; torchrun's processes write files of other names.
CUTS = [(name, cut) for name in FILES for cut in ("missing", "empty", "half") if (name, cut) != (FILES[3], "missing")]


@pytest.mark.parametrize("name, cut", CUTS)
def test_a_checkpoint_that_was_cut_off_does_not_count(run, tmp_path, name, cut):
    folder, objective = run
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-10" / name
    if cut == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if cut == "half" else 0])
    assert newest_checkpoint(tmp_path / "run", objective) == tmp_path / "run" / "checkpoint-9"
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    assert newest_checkpoint(tmp_path / "run", objective) is None


@pytest.mark.parametrize("older", [True, False])
def test_a_run_resumes_past_a_checkpoint_that_was_cut_off(run, tmp_path, older):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-10" / "optimizer.pt").write_bytes(b"PK")
    if not older:
        shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    target, drafter = tiny_pair("llama")
    out = io.StringIO()
    recipe = Recipe(steps=10, batch_size=4, anchors=4, save_every=10, log_every=1)
    console = Console(file=out, width=200)
    log = train_drafter(drafter, target, Cycles(64), tmp_path / "run", recipe, resume=True, console=console)
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 11))
    said = f"continuing from {tmp_path / 'run' / 'checkpoint-9'}" if older else "nothing to resume: "
    assert said in out.getvalue()
