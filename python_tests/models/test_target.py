import copy
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch

from dflash_ext.decode import decode
from dflash_ext.models import DFlashDrafter, Target
from python_tests.tiny import FAMILIES, MASK_TOKEN, VOCAB, random_prompts, tiny_model


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


@pytest.mark.parametrize(
    ("taps", "message"),
    [([1, 6], "tap 6 is out of range.*layers 0 to 5"), ([0, 3, 0], r"taps \[0, 3, 0\]: each layer can be tapped once")],
)
def test_refuses_taps_that_are_no_different_layers(taps, message):
    with pytest.raises(ValueError, match=message):
        Target(tiny_model("llama"), taps)


@pytest.fixture(params=["in memory", "on disk", "quantised"])
def elsewhere(request, tmp_path):
    """A model whose weights are no plain tensors in their places, and the model that it was made from."""
    model = tiny_model("llama", tie_word_embeddings=request.param == "in memory")
    moved = copy.deepcopy(model)
    if request.param == "in memory":
        accelerate.cpu_offload(moved, torch.device("cpu"))
    elif request.param == "on disk":
        names = ("embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(6)))
        places = {f"model.{name}": "disk" if "layers" in name else "cpu" for name in names} | {"lm_head": "disk"}
        accelerate.dispatch_model(moved, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    else:
        for module in (moved.lm_head, *moved.model.layers.modules()):
            if type(module) is torch.nn.Linear:
                module.weight = torch.nn.Parameter(Quantised(module.weight.data), requires_grad=False)
    return moved, model


class Quantised(torch.Tensor):
    """A weight that, like torchao's, serves `linear` and `dequantize` alone."""

    @staticmethod
    def __new__(cls, numbers):
        shape = dict(dtype=numbers.dtype, device=numbers.device)
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **shape)

    def __init__(self, numbers):
        self.numbers = numbers

    def dequantize(self):
        return self.numbers

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].numbers, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.detach.default:
            raise NotImplementedError(f"{function} of a quantised weight")
        return cls(args[0].numbers)


def test_weights_that_are_elsewhere(elsewhere):
    """Targets that accelerate offloads or torchao quantises are decoded, and tapped for training, as any other."""
    moved, model = elsewhere
    drafter = DFlashDrafter.for_target(Target(moved), mask_token_id=MASK_TOKEN, num_layers=1, block_size=4, taps=2)
    target, plain = (Target(each, drafter.config.target_layer_ids) for each in (moved, model))
    prompts = random_prompts(9, 4, 6)
    want = decode(plain, None, prompts, max_new_tokens=7)
    for choice in (None, drafter):
        got = decode(target, choice, prompts, max_new_tokens=7)
        assert [each.tokens for each in got.completions] == [each.tokens for each in want.completions]
    ids = torch.tensor(prompts[:1])
    torch.testing.assert_close(target.features(ids), plain.features(ids))
    torch.testing.assert_close(target.head, plain.head)
    assert (target.fingerprint, target.device, target.vocab_size) == (plain.fingerprint, plain.device, VOCAB)
    drafter.check_target(target)
    target.check_head()


def masks_of(weight: float):
    """A function that makes masks in which tokens that should be hidden lose so much in their scores, and no more."""

    def make(*_, inputs_embeds, position_ids=None, **__):
        length = inputs_embeds.shape[1]
        hidden = torch.ones(1, length, length, dtype=torch.bool).triu(1)
        if position_ids is not None:  # of sequences that start anew in their row
            sequence = (position_ids == 0).cumsum(1)
            hidden = hidden | (sequence[:, :, None] != sequence[:, None])
        return torch.zeros(hidden.shape, dtype=inputs_embeds.dtype).masked_fill(hidden, -weight).unsqueeze(1)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [3.0, 100.0])
def test_a_model_that_hides_too_little_is_found_out(monkeypatch, dtype, weight):
    """A twentieth of an attention's weight is enough, also beside the rounding of bfloat16."""
    target = Target(tiny_model("qwen3").to(dtype), [1])
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.create_causal_mask", masks_of(weight))
    assert target._is_causal_by_itself == (weight == 100)
    assert target._keeps_sequences_apart == (weight == 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_a_head_that_does_something_else_is_found_out(dtype, factor):
    model = tiny_model("llama").to(dtype)
    model.lm_head.register_forward_hook(lambda _, __, output: output * factor)
    target = Target(model)
    if factor == 1:
        target.check_head()
    else:
        with pytest.raises(ValueError, match="its logits are not the product of its hidden states and its head"):
            target.check_head()
