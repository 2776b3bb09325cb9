"""Every example runs, the README quotes the examples' files, and its table of operators is right."""

import contextlib
import gzip
import io
import json
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dflash_ext.data import read_texts
from dflash_ext.models import load_target
from dflash_ext.ops.backends import SERVED_BY
from dflash_ext.train import save_drafter
from python_tests.data.words import word_tokenizer
from python_tests.models.specforge_configs import BLOCK, TAPS, exported_config
from python_tests.tiny import tiny_model, tiny_pair

ROOT = Path(__file__).parents[1]


def run_to_exit(example: str, *words) -> tuple[str, str | int | None]:
    """What an example prints, and what it exits with.

    It runs in this process, because another one would first import torch for seconds.
    """
    code = None
    with mock.patch("sys.argv", [example, *map(str, words)]), contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(str(ROOT / example), run_name="__main__")
        except SystemExit as left:
            code = left.code
    return printed.getvalue(), code


def run(example: str, *words) -> str:
    printed, code = run_to_exit(example, *words)
    assert not code
    return printed


def test_drop_in():
    assert re.match(r"loss \d+\.\d+, accuracy 0\.\d+", run("examples/drop_in.py"))


def test_cache():
    assert run("examples/cache.py") == "[2, 8, 16, 64], in pages the same: True\n"


@pytest.mark.parametrize("name", ["drop_in.py", "cache.py"])
def test_the_readme_shows_the_example(name):
    body = (ROOT / "examples" / name).read_text().split('"""\n', 1)[1].strip()
    assert body in (ROOT / "README.md").read_text()


def test_the_readme_says_what_serves_each_operator():
    rows = re.findall(r"^\| (`.*`) \| (.*) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    said = {op: (cpu, cuda) for ops, cpu, cuda in rows for op in re.findall(r"`(\w+)`", ops)}
    for op, by in SERVED_BY.items():
        assert said[op] == (by["cpu"], by["cuda"])


def test_transformers_attention():
    assert re.match(
        r"denoising loss \d+\.\d+\nblock: .* by 0\.\d*[1-9]\d*\ncausal: .* by 0\.0+\n$",
        run("examples/transformers_attention.py"),
    )


def saved_target(folder: Path) -> PreTrainedModel:
    """A tiny target with a tokenizer, in a folder."""
    model = tiny_model("llama")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


def test_decode(tmp_path):
    _, drafter = tiny_pair("llama")
    saved_target(tmp_path / "target")
    save_drafter(drafter, tmp_path / "drafter")
    assert "tau" in run("examples/decode.py", tmp_path / "target", tmp_path / "drafter", "w005 w006")


@pytest.mark.parametrize("name", ["llada.py", "bd3lm.py"])
def test_trainers_of_masked_diffusion(name):
    """They learn to count: by chance, 5% of the tokens would be right."""
    right = re.search(r"(\d+)% of the tokens are right", run(f"examples/{name}", 200))
    assert int(right[1]) >= 80


def test_trl_sft(tmp_path):
    """TRL packs documents to a row, whose loss and gradients are those of the documents as sequences of their own."""
    from examples.trl_sft import make_trainer  # imports TRL

    saved_target(tmp_path / "target")
    texts = [" ".join(f"w{10 + (i + word) % 7:03}" for word in range(6 + i % 9)) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    names = (str(tmp_path / name) for name in ("target", "texts.jsonl", "output"))
    trainer = make_trainer(*names, steps=16, max_length=32)
    model = trainer.model
    for name, weight in model.named_parameters():  # at first B is 0, and A has no gradient
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 1
    packed = trainer.compute_loss(model, dict(batch))
    of_packed = torch.autograd.grad(packed, trained)
    model.set_attn_implementation("sdpa")
    documents = list(zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True))
    total = sum(
        (end - start - 1) * model(batch["input_ids"][:, start:end], labels=batch["labels"][:, start:end]).loss
        for start, end in documents
    )
    apart = total / sum(end - start - 1 for start, end in documents)
    torch.testing.assert_close(packed, apart)
    torch.testing.assert_close(of_packed, torch.autograd.grad(apart, trained), atol=1e-6, rtol=1e-4)

    model.set_attn_implementation("block_attn")
    trainer.args.learning_rate = 0.02
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model()
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()


def test_specforge(tmp_path):
    """A drafter as SpecForge exports it: its tau is that of the same drafter in a folder of ours."""
    target, drafter = tiny_pair("llama", taps=TAPS, block_size=BLOCK)
    (tmp_path / "exported").mkdir()
    config = exported_config("full_attention", "full_attention")
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config))
    save_file(drafter.state_dict(), tmp_path / "exported" / "model.safetensors")
    for key in ("rope_parameters", "rms_norm_eps"):
        setattr(drafter.config, key, config[key])
    save_drafter(drafter, tmp_path / "ours")
    saved_target(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w00{i} w011"}) + "\n" for i in (5, 6, 7)))
    figures = []
    for folder in ("exported", "ours"):
        names = [tmp_path / name for name in ("run", "draft.json", folder, "target", "prompts.jsonl")]
        run("examples/specforge_drafter.py", *names, "--tau-only", "--output", tmp_path / "figures.json")
        figures.append(json.loads((tmp_path / "figures.json").read_text())["prompts"])
    exported, ours = figures
    assert (exported["tau"], exported["acceptance"]) == (ours["tau"], ours["acceptance"])
    assert len(ours["acceptance"]) == BLOCK - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a server would start")
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_serve(tmp_path, server):
    save_drafter(tiny_pair("llama")[1], tmp_path / "drafter")
    printed, why = run_to_exit("examples/serve.py", server, "TARGET", tmp_path / "drafter")
    assert why == f"{server} decodes with a drafter on a GPU alone, and here is none"
    command = shlex.split(printed)
    documented = (ROOT / "docs/serving.md").read_text()
    assert all(word in documented for word in command if word.startswith("--"))
    assert server != "vllm" or json.loads(command[-1])["num_speculative_tokens"] == 5


def test_debian_text(tmp_path):
    """A page, a source of documentation and a dictionary become documents; a second copy of one does not."""
    source = tmp_path / "unpacked"
    source.mkdir()
    body = "".join(f"<p>Sentence {i} of the page.</p>" for i in range(60))
    for name in ("a.html", "b.html"):
        (source / name).write_text(
            f"<html><head><title>no</title></head><body>{body}<script>no()</script></body></html>"
        )
    (source / "c.rst.txt").write_text("Title\n=====\n\n\n\n" + "A sentence of the source.\n" * 40)
    with gzip.open(source / "d.dict.dz", "wt") as file:
        file.write("entry\n   its meaning\n" * 1000)
    (source / "e.png").write_bytes(b"\x89PNG")
    run("examples/debian_text.py", tmp_path / "corpus", source)
    texts = list(read_texts([tmp_path / "corpus"]))
    assert len(texts) == 5 and sum(text.startswith("Sentence 0") for text in texts) == 1
    assert not any("no()" in text or "\n\n\n" in text for text in texts)


def test_fine_tune(tmp_path):
    """All weights learn, and what is saved is a target for `--drafter-base`."""
    target, _ = tiny_pair("llama")
    target.model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    rows = [" ".join(f"w{3 + (i + j) % 9:03}" for j in range(12)) for i in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = "--steps", 20, "--batch-size", 4, "--length", 24, "--learning-rate", 1e-2
    told = run(
        "examples/fine_tune.py", tmp_path / "base", tmp_path / "tuned", "--text", tmp_path / "text.jsonl", *options
    )
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", told)]
    assert losses[-1] < 0.8 * losses[0]
    tuned, _ = load_target(tmp_path / "tuned")
    pairs = zip(tuned.named_parameters(), target.model.named_parameters(), strict=True)
    assert not any(torch.equal(new, old) for (_, new), (_, old) in pairs)
