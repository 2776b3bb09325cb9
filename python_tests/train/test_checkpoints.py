import io
import shutil
from dataclasses import fields

import pytest
import torch
from rich.console import Console

from dflash_ext.train import LoraRecipe, Recipe, new_lora_drafter, train_drafter
from dflash_ext.train.checkpoints import identity_of, newest_checkpoint
from dflash_ext.train.drafters import parts_of
from python_tests.tiny import MASK_TOKEN, tiny_pair
from python_tests.train.test_training import Cycles

FILES = ["objective.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with checkpoints at steps 9 and 10."""
    folder = tmp_path_factory.mktemp("run")
    target, drafter = tiny_pair("llama")
    for steps in (9, 10):
        recipe = Recipe(steps=steps, batch_size=4, anchors=4, save_every=steps, log_every=1)
        train_drafter(drafter, target, Cycles(64), folder / str(steps), recipe)
        (folder / str(steps) / f"checkpoint-{steps}").rename(folder / f"checkpoint-{steps}")
    return folder


def test_the_newest_is_that_with_the_most_steps(run, tmp_path):
    assert newest_checkpoint(run) == run / "checkpoint-10"
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


# Options that a resumed run may change, because they decide neither losses nor steps.
FREE = {"steps", "batch_size", "accumulation", "save_every", "evaluate_every", "evaluate_prompts", "log_every"}
FREE |= {"checkpoint_activations", "compile", "cuda_graphs", "tensor_parallel", "report_to", "trainer_args"}
CHANGED = {"learning_rate": 1e-3, "optimizer": "muon", "seed": 1, "anchors": 5, "noise_ratio": 0.5, "gamma": 4.0}
CHANGED |= {"block_sizes": (4,), "pack_length": 64, "loss": "kl", "teacher_mix": 0.5, "kl_weight": 0.5}
CHANGED |= {"context_ratio": (0.1, 0.5), "fixed_anchors": True, "forwards": 1, "warmup": 0.5, "weight_decay": 0.5}


@pytest.mark.parametrize("kind", [Recipe, LoraRecipe])
def test_options_that_decide_a_training_are_in_its_identity(kind):
    target, drafter = tiny_pair("llama")
    if kind is LoraRecipe:
        drafter = new_lora_drafter(target, 0, mask_token_id=MASK_TOKEN, block_size=4, rank=4)

    def identity(**change):
        recipe = kind(**{"optimizer": "adamw"} | change)
        parts = parts_of(drafter, target, recipe)
        return identity_of(parts.objective, parts.collator, recipe, Cycles(9))

    for name in {field.name for field in fields(kind)} - FREE:
        assert identity(**{name: CHANGED[name]}) != identity(), name


def test_a_training_is_for_its_target():
    target, drafter = tiny_pair("llama")
    before = parts_of(drafter, target, Recipe()).objective.identity()
    with torch.no_grad():
        target.layers[0].mlp.down_proj.weight.add_(1)
    assert parts_of(drafter, target, Recipe()).objective.identity() != before


@pytest.mark.parametrize("name, value", [("noise_ratio", 0.5), ("learning_rate", 1e-3), ("samples", 60)])
def test_other_options_are_refused(run, name, value):
    target, drafter = tiny_pair("llama")
    settings = dict(steps=12, batch_size=4, anchors=4)
    samples = Cycles(value if name == "samples" else 64)
    recipe = Recipe(**settings | ({} if name == "samples" else {name: value}))
    with pytest.raises(ValueError, match=f"checkpoint-10 is of a training with other options: its {name} is .*{value}"):
        train_drafter(drafter, target, samples, run, recipe, resume=True)


# Without torchrun's option there is one file of random states; torchrun's processes write files of other names.
CUTS = [(name, cut) for name in FILES for cut in ("missing", "empty", "half") if (name, cut) != (FILES[3], "missing")]


@pytest.mark.parametrize("name, cut", CUTS)
def test_a_checkpoint_that_was_cut_off_does_not_count(run, tmp_path, name, cut):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-10" / name
    if cut == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if cut == "half" else 0])
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-9"
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    assert newest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize("older", [True, False])
def test_a_run_resumes_past_a_checkpoint_that_was_cut_off(run, tmp_path, older):
    shutil.copytree(run, tmp_path / "run")
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
