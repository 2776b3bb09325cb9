import io
import re

import pytest
from rich.console import Console

from dflash_ext.decode import Engine, decode
from dflash_ext.demo import compare as module
from dflash_ext.demo.compare import compare
from python_tests.data.words import word_tokenizer
from python_tests.tiny import random_prompts, tiny_pair

OPTIONS = dict(max_new_tokens=12, stop_token_ids=())


def compared(**options):
    target, drafter = tiny_pair("llama")
    prompts = dict(zip(("one", "two"), random_prompts(5, 9), strict=True))
    out = io.StringIO()
    tau = compare(Console(file=out, width=160), target, drafter, word_tokenizer(), prompts, **OPTIONS, **options)
    return out.getvalue(), tau, decode(target, drafter, list(prompts.values()), **OPTIONS)


def rows(shown):
    """The rows of both tables, by their first cell."""
    cells = [re.split(r"  +", line.strip()) for line in shown.splitlines()]
    return [(name, figures) for name, *figures in cells if name in (module.GENERATE, module.PLAIN, module.SPECULATIVE)]


def test_each_prompt_is_compared_and_the_mean_tau_returned():
    shown, tau, decoded = compared()
    assert tau == decoded.tau and f"tau {tau:.2f}; speculative" in shown
    for line, name, completion in zip(shown.splitlines(), ("one", "two"), decoded.completions, strict=False):
        assert line.split()[:5] == ["equal", "tau", f"{completion.tau:.2f}", "12", "tokens"]
        assert f"'{name}' -> 'w" in line
    assert [name for name, _ in rows(shown)] == [
        "plain",
        "speculative",
        "transformers generate",
        "plain",
        "speculative",
    ]
    assert [figures[0] for _, figures in rows(shown)[:2]] == ["2", "2"]  # the untimed calls do not count
    assert "2 of 2 answers of transformers' generate are these, token by token" in shown


def test_the_speeds_are_those_of_the_clock(monkeypatch):
    seconds = {module.GENERATE: [6.0, 8.0], module.PLAIN: [3.0, 2.0], module.SPECULATIVE: [2.0, 1.0]}

    def take_turns(ways, prompts, device):
        answers = {name: [way(prompt) for prompt in prompts] for name, way in ways.items()}
        return {name: module.Timed(answers[name], seconds[name][: len(prompts)]) for name in ways}

    monkeypatch.setattr(module, "take_turns", take_turns)
    shown, tau, _ = compared()
    assert rows(shown)[2:] == [
        ("transformers generate", ["14.0", "1.7", "1.00"]),
        ("plain", ["5.0", "4.8", "3.00"]),  # the median of 2 and 4
        ("speculative", ["3.0", "8.0", "5.50"]),  # of 3 and 8
    ]
    assert "5.50x as fast as transformers' generate here, and 1.75x as fast as plain decoding" in shown


def test_a_difference_is_an_error_that_names_the_prompt(monkeypatch):
    def take_turns(ways, prompts, device):
        timed = own(ways, prompts, device)
        timed[module.PLAIN].answers[-1] = [0]
        return timed

    own = module.take_turns
    monkeypatch.setattr(module, "take_turns", take_turns)
    with pytest.raises(RuntimeError, match="differs from the target's own for: two$"):
        compared()


def test_only_the_speculative_run_has_the_block_size(monkeypatch):
    widths = []

    class Watched(Engine):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            widths.append(self.cycle.width)

    monkeypatch.setattr(module, "Engine", Watched)
    compared(block_size=4)
    assert widths == [0, 3]
