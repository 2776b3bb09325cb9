"""Ways of decoding, timed in turns."""

import pytest
import torch

from dflash_ext.decode import decode
from dflash_ext.eval.speed import Timed, take_turns, transformers_generate
from python_tests.tiny import random_prompts, tiny_pair


def test_ways_take_turns_and_change_their_order():
    calls = []
    ways = {name: lambda prompt, name=name: calls.append((name, *prompt)) or [1, 2] for name in "ab"}
    timed = take_turns(ways, [[1], [2]], torch.device("cpu"))
    assert calls == [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert all(each.answers == [[1, 2]] * 2 and min(each.seconds) >= 0 for each in timed.values())


def test_speeds_by_hand():
    """Answers of unequal lengths count by their tokens."""
    slow, fast = Timed([[1, 2], [3]], [4.0, 2.0]), Timed([[1, 2], [3, 4]], [2.0, 1.0])
    assert slow.tokens_per_second == 0.5 and fast.tokens_per_second == pytest.approx(4 / 3)
    assert fast.speedup(slow) == 3  # the median of 2 and 4


def test_generate_gives_the_tokens_of_plain_decoding_and_ends_where_it_does():
    target, _ = tiny_pair("llama")
    (prompt,) = random_prompts(6)
    (whole,) = decode(target, None, [prompt], max_new_tokens=8).completions
    stop = whole.tokens[3]
    for stops in ((), (stop,)):
        generate = transformers_generate(target, max_new_tokens=8, stop_token_ids=stops)
        (completion,) = decode(target, None, [prompt], max_new_tokens=8, stop_token_ids=stops).completions
        assert generate(prompt) == completion.tokens
