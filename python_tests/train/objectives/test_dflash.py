"""The step of a drafter under what training puts around it: autocast, checkpointing, torch.compile, CUDA graphs."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dflash_ext import reference
from dflash_ext.models import drafter as drafter_module
from dflash_ext.train import AnchorCollator
from dflash_ext.train.objectives import DFlashObjective
from python_tests.exactness import allowed_error
from python_tests.tiny import MASK_TOKEN, tiny_pair

LENGTH = 40


def a_step(device, dtype=torch.float32, length=LENGTH, gamma=3.0, **options):
    """A drafter in training mode with a full and a sliding layer, its objective, a batch and the batch's features."""
    target, drafter = tiny_pair("llama", sliding=True, **options)
    for part in (target.model, drafter):
        part.to(device, dtype)
    return drafter.train(), DFlashObjective(drafter, target, gamma), *a_batch(target, length, device)


def a_batch(target, length, device):
    ids = torch.randint(3, MASK_TOKEN, (2, length))
    samples = [{"input_ids": row, "loss_mask": torch.ones_like(row, dtype=torch.bool)} for row in ids]
    batch = {name: x.to(device) for name, x in AnchorCollator(7, 6, MASK_TOKEN)(samples).items()}
    return batch, target.features(batch["input_ids"])


def gradients(model, objective, batch, features):
    loss = objective(model, batch, features).losses.sum()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(objective.drafter.parameters()))])


def distance(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_bool(), enable_gqa=True)


def test_gradients_are_as_exact_as_with_torchs_attention(device, monkeypatch):
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        drafter, objective, batch, features = a_step("cpu", torch.bfloat16)
        exact = copy.deepcopy(objective)
        for module in (exact.drafter, exact.target.model):
            module.double()
        with monkeypatch.context() as patch:
            patch.setattr(drafter_module, "block_attn", reference.block_attn)
            want = gradients(exact.drafter, exact, batch, features.double())
        for module in (drafter, objective.target.model):
            module.to(device)
        inputs = {name: x.to(device) for name, x in batch.items()}, features.to(device)
        got = [gradients(drafter, objective, *inputs)]
        with monkeypatch.context() as patch:
            patch.setattr(drafter_module, "block_attn", sdpa)
            got.append(gradients(drafter, objective, *inputs))
        errors.append([distance(grads.cpu(), want) for grads in got])
    our_error, torchs_error = torch.tensor(errors).log().mean(0).exp().tolist()
    assert our_error <= allowed_error(torchs_error, torch.finfo(torch.bfloat16).eps / 4)


def test_autocast(device):
    drafter, objective, *inputs = a_step(device)
    want = gradients(drafter, objective, *inputs)
    with torch.autocast(device, torch.bfloat16):
        got = gradients(drafter, objective, *inputs)
    assert got.dtype == torch.float32 and 1e-4 < distance(got, want) < 5e-2


def test_activation_checkpointing(device):
    drafter, objective, *inputs = a_step(device, torch.bfloat16 if device == "cuda" else torch.float32)
    want = gradients(drafter, objective, *inputs)
    calls = []
    drafter.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    drafter.gradient_checkpointing_enable()
    assert distance(gradients(drafter, objective, *inputs), want) < (1e-2 if device == "cuda" else 1e-6)
    assert len(calls) == 2


def test_compiles_whole_and_once_for_all_lengths(device):
    """The second graph has dynamic shapes."""
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    drafter, objective, *_ = a_step(device, torch.bfloat16 if device == "cuda" else torch.float32)
    compiled = torch.compile(drafter, fullgraph=True, backend=graphs)
    for length in (LENGTH, LENGTH - 1, 33, 51, 20):
        inputs = a_batch(objective.target, length, device)
        got, want = (gradients(model, objective, *inputs) for model in (compiled, drafter))
        assert distance(got, want) < (1e-2 if device == "cuda" else 1e-6)
    assert graphs.frame_count == 2


@pytest.mark.gpu
def test_one_plan_for_all_layers():
    class Plans(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.made += op is torch.ops.dflash_ext.block_attn_plan.default
            return op(*args, **kwargs or {})

    drafter, objective, *inputs = a_step("cuda", torch.bfloat16, num_layers=4)
    with Plans() as plans:
        gradients(drafter, objective, *inputs)
    assert plans.made == len(set(drafter.config.layer_types)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("gamma", [3.0, None])
def test_a_cuda_graph_holds_whole_steps(gamma):
    """Forward, backward and optimizer; the graph's inputs change between its replays."""
    drafter, objective, batch, features = a_step("cuda", torch.bfloat16, gamma=gamma)
    objective.max_rows = batch["labels"].numel()
    plain = copy.deepcopy(drafter)
    batches = [a_batch(objective.target, LENGTH, "cuda") for _ in range(4)]

    def step(drafter, objective, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss = objective(drafter, batch, features).losses.sum() / objective.divisor(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def take(index):
        for name, value in batches[index][0].items():
            batch[name].copy_(value)
        features.copy_(batches[index][1])

    graphed, eager = (
        partial(step, model, DFlashObjective(model, objective.target, gamma, objective.max_rows), optimizer)
        for model in (drafter, plain)
        for optimizer in [torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)]
    )
    take(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            graphed()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = graphed()
    for _ in range(3):
        eager()
    for index in (1, 2, 3):
        take(index)
        graph.replay()
        torch.testing.assert_close(captured, eager(), rtol=2e-2, atol=0)
    for one, other in zip(drafter.parameters(), plain.parameters(), strict=True):
        assert distance(one.detach(), other.detach()) < 2e-2
