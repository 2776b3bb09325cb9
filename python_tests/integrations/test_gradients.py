"""A gradient step of transformers' models under block_attn, against eager attention in float64.

In bfloat16 the gradients may be at most 1.5 times as wrong as with PyTorch's attention in bfloat16.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from python_tests.exactness import allowed_error
from python_tests.integrations.test_attention import LENGTH, each, layer_masks, model_of, tokens

FAMILIES = ["llama", "qwen3", "gemma3", "gemma4"]
MODELS = 5  # random models; what rounding does to a gradient differs from one to the next


def random_model(family, seed):
    """Weights of the size that trained models have: with larger ones a model amplifies every rounding."""
    model = model_of(family)
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.05)
    if family == "gemma4":  # its attention has no scale but this weight
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data.fill_(layer.self_attn.head_dim**-0.5)
    return model


def gradients(model, implementation, ids, counts, inputs):
    """The gradients of all parameters, in one vector of float64, of the cross-entropy of the tokens that count."""
    model.set_attn_implementation(implementation)
    logits = model(ids, use_cache=False, **inputs).logits[:, :-1]
    loss = F.cross_entropy(logits[counts[:, 1:]], ids[:, 1:][counts[:, 1:]])
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten().double() for grad in grads])


@pytest.mark.parametrize("masked_by", ["padding", "intervals"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_exact_as_with_torchs_attention(family, masked_by, device):
    ids = tokens(2, LENGTH).to(device)
    counts = torch.ones_like(ids, dtype=torch.bool)
    if masked_by == "padding":
        counts[1, -3:] = False
        ours = peers = exact = {"attention_mask": counts.long()}
    else:
        masks = each(layer_masks(family, prefix_len=torch.tensor([5, 9])), lambda mask: mask.to(device))
        ours = {"interval_mask": masks}
        peers = {"attention_mask": each(masks, lambda mask: mask.to_dense(torch.bfloat16))}
        exact = {"attention_mask": each(masks, lambda mask: mask.to_dense(torch.float64))}
    errors = []
    for seed in range(MODELS):
        model = random_model(family, seed).to(device)
        want = gradients(copy.deepcopy(model).double(), "eager", ids, counts, exact)
        model.bfloat16()
        got = gradients(model, "block_attn", ids, counts, ours), gradients(model, "sdpa", ids, counts, peers)
        errors.append([((grads - want).norm() / want.norm()).item() for grads in got])
    our_error, torchs_error = torch.tensor(errors).log().mean(0).exp().tolist()
    assert our_error <= allowed_error(torchs_error, torch.finfo(torch.bfloat16).eps / 4)
