"""Every example runs, the README quotes the examples' files, and its table of operators is right."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_ext.ops.backends import SERVED_BY
from dflash_ext.train import save_drafter
from python_tests.data.words import word_tokenizer
from python_tests.tiny import tiny_pair

ROOT = Path(__file__).parents[1]


def run(*words) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_decode(tmp_path):
    target, drafter = tiny_pair("llama")
    target.model.save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    save_drafter(drafter, tmp_path / "drafter")
    assert "tau" in run("examples/decode.py", tmp_path / "target", tmp_path / "drafter", "w005 w006")
