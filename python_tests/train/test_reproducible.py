"""What a run draws follows from its seed, the step and the sample alone."""

import pytest
import torch
from safetensors.torch import load_file

from dflash_ext.models import Target
from dflash_ext.train import AnchorCollator, Recipe, new_drafter, train_drafter
from python_tests.tiny import MASK_TOKEN, tiny_model, tiny_pair
from python_tests.train.test_training import Cycles


def test_the_anchors_of_a_sample_do_not_depend_on_its_batch():
    collate = AnchorCollator(5, 6, MASK_TOKEN)
    samples = [Cycles()[i] | {"key": (0, 3, i)} for i in range(6)]
    whole = collate(samples)
    torch.rand(1)  # nor on torch's global state
    for index, sample in enumerate(samples):
        alone = collate([sample])
        for name in ("anchors", "keep", "limits", "noise_ids", "counts"):
            assert torch.equal(alone[name][0], whole[name][index]), name
    other = collate([sample | {"key": (0, 4, i)} for i, sample in enumerate(samples)])
    assert not torch.equal(other["anchors"], whole["anchors"])


def test_the_first_weights_follow_from_the_seed():
    target = Target(tiny_model("llama"))
    options = dict(mask_token_id=MASK_TOKEN, num_layers=1, taps=2)
    state = torch.random.get_rng_state()
    first, again, other = (new_drafter(target, seed, **options).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class Interrupt(Exception):
    pass


@pytest.fixture
def deterministic(device, monkeypatch):
    """torch's deterministic algorithms on a GPU; the CPU's are."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(device == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("killed_after", [3, 4, 5])
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(tmp_path, device, deterministic, killed_after):
    """Five steps of two accumulated batches each over a dataset of less than two steps, with checkpoints at 2 and 4."""
    recipe = Recipe(steps=5, batch_size=3, accumulation=2, anchors=3, save_every=2, log_every=1, evaluate_every=2)

    def train(folder, *, interrupt_at=None, **options):
        target, drafter = tiny_pair("llama")
        for part in (target.model, drafter):
            part.to(device)
        calls = []

        def count(module, *_):
            calls.append(1)
            if sum(calls) == interrupt_at:
                raise Interrupt

        drafter.norm.register_forward_hook(lambda module, *_: count(module) if module.training else None)
        log = train_drafter(drafter, target, Cycles(10), tmp_path / folder, recipe, held_out=Cycles(4), **options)
        return drafter, log

    whole, log = train("whole")
    with pytest.raises(Interrupt):
        train("cut", interrupt_at=2 * killed_after)
    resumed, resumed_log = train("cut", resume=True)
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    timeless = [
        [
            {name: value for name, value in entry.items() if "runtime" not in name and "second" not in name}
            for entry in each
        ]
        for each in (log, resumed_log)
    ]
    assert timeless[0][:-1] == timeless[1][:-1]  # the last entry sums up the run, which was shorter
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
