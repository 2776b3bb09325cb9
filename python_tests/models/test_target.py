from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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
