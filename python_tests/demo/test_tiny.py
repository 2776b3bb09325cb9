"""The demo's first part with a few steps and a few small files in place of the standard library."""

import io

from rich.console import Console

from dflash_ext.demo import tiny


def test_the_whole_path(small, monkeypatch):
    trained_on, tokenizer = [], tiny._tokenizer
    monkeypatch.setattr(tiny, "_tokenizer", lambda texts: trained_on.extend(texts) or tokenizer(texts))
    out = io.StringIO()
    tiny.tiny_model(Console(file=out, width=160))
    shown = out.getvalue()
    assert len(trained_on) == small - 2 and f"{small - 2} files" in shown
    for line in ("target: ", "drafter: loss ", "speculative decoding is ", "this part took "):
        assert line in shown
    # Files 0 and 8 are kept for the prompts: one line each, and nothing was trained on them.
    verdicts = [line for line in shown.splitlines() if "->" in line and "tokens" in line]
    assert [line.split()[0] for line in verdicts] == ["equal"] * 2
    for index, line in zip((0, 8), verdicts, strict=True):
        assert f"'# file {index}'" in line
        assert not any(text.startswith(f"# file {index}\n") for text in trained_on)
