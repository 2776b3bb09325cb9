"""The README and the guides name files, options, targets of make and environment variables that exist, and their
Python runs."""

import itertools
import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from dflash_ext.cli import app
from dflash_ext.models import Adaptation, DFlashConfig, Target, save_adaptation, save_drafter
from python_tests.data.letters import letters
from python_tests.tiny import MASK_TOKEN, tiny_model, tiny_pair

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [ROOT / "setup.py", *(ROOT / "dflash_ext").rglob("*.py"), *(ROOT / "csrc").rglob("*.[hc]*")]
OTHER_PROGRAMS = {"--no-deps", "--no-build-isolation", "--nproc-per-node", "--module"}  # options of pip and torchrun
# Of vLLM and SGLang.
OTHER_PROGRAMS |= {"--speculative-config", "--model-path", "--max-running-requests"}
OTHER_PROGRAMS |= {f"--speculative-{name}" for name in ("algorithm", "num-draft-tokens", "dflash-block-size")}
OTHER_PROGRAMS |= {f"--speculative-draft-{name}" for name in ("model-path", "attention-backend", "window-size")}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def options_of(command) -> set[str]:
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


@page
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@page
def test_options_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
    assert named - OTHER_PROGRAMS - {"--help"} <= options_of(get_command(app))


@page
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for names in targets for name in names.split()}
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M)) <= targets


@page
def test_environment_variables_exist(page):
    sources = "".join(path.read_text() for path in SOURCES)
    for name in set(re.findall(r"DFLASH_EXT_[A-Z_]+", page.read_text())):
        assert name in sources, name


def keys_in_table(lines, first):
    """The keys of the first table behind the line that begins with `first`, and whether they are in dflash_config."""
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    table = list(itertools.dropwhile(lambda line: not line.startswith("|"), lines[start:]))
    rows = [row.split("|") for row in itertools.takewhile(lambda line: line.startswith("|"), table)][2:]
    return {(key, "dflash_config" in where) for _, keys, where, *_ in rows for key in re.findall(r"`(\w+)`", keys)}


def test_what_servers_read_is_what_is_written(tmp_path):
    """Keys of the first table of docs/serving.md are in every config.json, those of the second where they are set."""
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    _, drafter = tiny_pair("llama")
    save_drafter(drafter, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    always = keys_in_table(lines, "`dflash-ext train` writes the published layout")
    assert len(always) > 20
    for key, is_inside in always - {("rope_scaling", False)}:
        assert key in (written["dflash_config"] if is_inside else written), key
    options = {"is_causal": True, "sample_from_anchor": True, "window_convention": "speculators"}
    options |= {"own_embeddings": True, "own_head": True, "draft_vocab_size": 50}
    factors = {"input_embedding_scale": 2.0, "output_multiplier": 0.5, "final_logit_softcapping": 30.0}
    sometimes = keys_in_table(lines, "Other keys are those of every Qwen3 config")
    assert sometimes == {(key, False) for key in options} | {(key, True) for key in factors}
    again = DFlashConfig.from_dict(written | options | {"dflash_config": written["dflash_config"] | factors}).to_dict()
    assert {key: again[key] for key in options} == options
    assert {key: again["dflash_config"][key] for key in factors} == factors


def snippets_of(page):
    """The Python of a page, in order. That of docs/prompts.md loads data sets from the hub."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S) if page.name != "prompts.md" else []


@pytest.mark.parametrize("page", [each for each in PAGES if snippets_of(each)], ids=lambda path: path.name)
def test_snippets_run_in_order(page, tmp_path, monkeypatch):
    """With a tiny target and drafter in the folders that the pages name."""
    monkeypatch.chdir(tmp_path)
    _, drafter = tiny_pair("llama")
    for folder in ("my-drafter", "dflash_ext/drafters/smollm2-135m-instruct"):
        save_drafter(drafter, folder)
    for folder in ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        tiny_model("llama").save_pretrained(folder)
        letters().save_pretrained(folder)
    save_adaptation(Adaptation.for_target(Target(tiny_model("llama")), mask_id=MASK_TOKEN, rank=4), "denoiser")
    names = {}
    for snippet in snippets_of(page):
        exec(snippet, names)


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
