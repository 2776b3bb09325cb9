from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dflash_ext.decode import RowCache
from dflash_ext.models import Target
from python_tests.tiny import FAMILIES, random_prompts, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_hidden_states_of_transformers(family):
    model = tiny_model(family)
    target = Target(model, [0, 3, 5])
    tokens = torch.tensor(random_prompts(12))
    states = model(tokens, output_hidden_states=True).hidden_states
    expected = torch.cat([states[1], states[4], states[6]], dim=-1)
    torch.testing.assert_close(target.features(tokens), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_against_a_cache_equal_one_pass(family):
    """Rows of different lengths, fed in pieces with padding and a rejected tail, give the whole sequence's logits."""
    model = tiny_model(family)
    target = Target(model, [1, 4])
    rows = random_prompts(20, 13)
    cache = RowCache(32)

    def step(pieces: list[list[int]], starts: list[int]):
        width = max(map(len, pieces))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in pieces])
        rows = zip(pieces, starts, strict=True)
        positions = torch.tensor([[-1] * (width - len(p)) + list(range(s, s + len(p))) for p, s in rows])
        cache.place(positions, int(positions.max()) + 1)
        return target.step(ids, positions, cache, keep_logits=width)

    step([rows[0][:9], rows[1][:4]], [0, 0])
    step([[50, 51, 52], [53, 54, 55]], [9, 4])  # rejected: written over below
    logits, features = step([rows[0][9:], rows[1][4:]], [9, 4])
    for row, (tokens, kept) in enumerate(zip(rows, (11, 9), strict=True)):
        whole = torch.tensor([tokens])
        torch.testing.assert_close(logits[row, -kept:], model(whole).logits[0, -kept:], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(features[row, -kept:], target.features(whole)[0, -kept:], atol=2e-5, rtol=1e-4)


def test_threads_read_their_own_taps():
    """Two targets of one model, tapped at different layers, each used by two threads."""
    model = tiny_model("llama")
    targets = [Target(model, [0, 3, 5]), Target(model, [2, 3])]
    jobs = [(targets[i % 2], torch.tensor(random_prompts(7, seed=i))) for i in range(100)]
    expected = [target.features(ids) for target, ids in jobs]
    with ThreadPoolExecutor(4) as pool:
        features = list(pool.map(lambda job: job[0].features(job[1]), jobs))
    assert all(map(torch.equal, features, expected))


def test_a_target_leaves_its_model_as_it_was():
    model = tiny_model("llama")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    target = Target(model, [0, 3, 5])
    del target
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_refuses_taps_out_of_range():
    with pytest.raises(ValueError, match="tap 6 is out of range.*layers 0 to 5"):
        Target(tiny_model("llama"), [1, 6])


def test_cache_refuses_positions_beyond_its_capacity():
    with pytest.raises(ValueError, match="position 8 is beyond the cache's capacity of 8"):
        RowCache(8).place(torch.arange(9)[None], 9)
