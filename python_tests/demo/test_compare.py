import io

import pytest
from rich.console import Console

from dflash_ext.decode import decode
from dflash_ext.demo import compare as module
from dflash_ext.demo.compare import compare
from python_tests.data.words import word_tokenizer
from python_tests.tiny import random_prompts, tiny_pair

OPTIONS = dict(max_new_tokens=12, stop_token_ids=())


def compared():
    target, drafter = tiny_pair("llama")
    prompts = dict(zip(("one", "two"), random_prompts(5, 9), strict=True))
    out = io.StringIO()
    tau = compare(Console(file=out, width=160), target, drafter, word_tokenizer(), prompts, **OPTIONS)
    return out.getvalue(), tau, decode(target, drafter, list(prompts.values()), **OPTIONS)


def test_each_prompt_is_compared_and_the_mean_tau_returned():
    shown, tau, decoded = compared()
    assert tau == decoded.tau and f"tau {tau:.2f}; speculative" in shown
    for line, name, completion in zip(shown.splitlines(), ("one", "two"), decoded.completions, strict=False):
        assert line.split()[:5] == ["equal", "tau", f"{completion.tau:.2f}", "12", "tokens"]
        assert f"'{name}' -> 'w" in line
    assert "plain" in shown and "speculative" in shown


def test_a_difference_is_an_error_that_names_the_prompt(monkeypatch):
    def wrong(target, drafter, prompts, **options):
        decoded = decode(target, drafter, prompts, **options)
        if drafter is not None:
            decoded.completions[1].tokens[-1] += 1
        return decoded

    monkeypatch.setattr(module, "decode", wrong)
    with pytest.raises(RuntimeError, match="differs from the target's own for: two$"):
        compared()


def test_the_speculative_run_is_the_one_with_the_block_size_and_the_tau(monkeypatch):
    widths = []

    def watched(target, drafter, prompts, **options):
        decoded = decode(target, drafter, prompts, **options)
        widths.append(decoded.draft_width)
        decoded.completions[0].committed = [4, 3] if drafter else [1, 1]
        return decoded

    monkeypatch.setattr(module, "decode", watched)
    target, drafter = tiny_pair("llama")
    prompts = {"one": random_prompts(5)[0]}
    tau = compare(Console(quiet=True), target, drafter, word_tokenizer(), prompts, block_size=4, **OPTIONS)
    assert widths == [0, 3] and tau == 3.5
