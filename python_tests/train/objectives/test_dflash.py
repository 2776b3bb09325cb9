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
from dflash_ext.train import AnchorCollator, position_decay
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


def gradients(objective, batch, features):
    loss = objective(batch, features).losses.sum()
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
            want = gradients(exact, batch, features.double())
        for module in (drafter, objective.target.model):
            module.to(device)
        inputs = {name: x.to(device) for name, x in batch.items()}, features.to(device)
        got = [gradients(objective, *inputs)]
        with monkeypatch.context() as patch:
            patch.setattr(drafter_module, "block_attn", sdpa)
            got.append(gradients(objective, *inputs))
        errors.append([distance(grads.cpu(), want) for grads in got])
    our_error, torchs_error = torch.tensor(errors).log().mean(0).exp().tolist()
    assert our_error <= allowed_error(torchs_error, torch.finfo(torch.bfloat16).eps / 4)


def test_autocast(device):
    drafter, objective, *inputs = a_step(device)
    want = gradients(objective, *inputs)
    with torch.autocast(device, torch.bfloat16):
        got = gradients(objective, *inputs)
    assert got.dtype == torch.float32 and 1e-4 < distance(got, want) < 5e-2


def test_activation_checkpointing(device):
    drafter, objective, *inputs = a_step(device, torch.bfloat16 if device == "cuda" else torch.float32)
    want = gradients(objective, *inputs)
    calls = []
    drafter.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    drafter.gradient_checkpointing_enable()
    assert distance(gradients(objective, *inputs), want) < (1e-2 if device == "cuda" else 1e-6)
    assert len(calls) == 2


def test_compiles_whole_and_once_for_all_lengths(device):
    """The second graph has dynamic shapes."""
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    drafter, objective, *_ = a_step(device, torch.bfloat16 if device == "cuda" else torch.float32)
    compiled = copy.deepcopy(objective)
    compiled.drafter.compile(fullgraph=True, backend=graphs)
    for length in (LENGTH, LENGTH - 1, 33, 51):
        inputs = a_batch(objective.target, length, device)
        got, want = (gradients(one, *inputs) for one in (compiled, objective))
        assert distance(got, want) < (1e-2 if device == "cuda" else 1e-6)
    assert graphs.frame_count == 2


def test_a_compiled_step_keeps_products_alone(device):
    """What the drafter keeps for its backward beside its inputs and weights, in elements."""
    drafter, objective, batch, features = a_step(device, torch.bfloat16 if device == "cuda" else torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(drafter.forward, fullgraph=True, backend="aot_eager")
    outside = {x.untyped_storage().data_ptr() for x in (*drafter.parameters(), *batch.values(), features)}
    kept = {}

    def count(x):
        if x.untyped_storage().data_ptr() not in outside and x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    def forward(**inputs):  # the loss keeps tensors of its own
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            return compiled(**inputs)

    drafter.forward = forward
    objective(batch, features)
    config = drafter.config
    blocks, context = batch["labels"].numel(), features.shape[:2].numel()
    drafted = blocks // config.block_size * (config.block_size - 1)
    distinct = batch["anchors"].numel() + len(features)  # rows of the first layer: anchors, and the mask token
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def layer(rows, results):
        """Its input, q, k and v; attention's result with the LSE; gate and up."""
        projected = rows * (config.hidden_size + queries + 2 * keys) + 2 * context * keys
        attended = blocks * (queries + config.num_attention_heads)
        return projected + attended + 2 * results * config.intermediate_size

    products = layer(distinct, blocks) + layer(blocks, drafted) + blocks * config.hidden_size  # of the first o_proj
    ends = (context + drafted) * config.hidden_size  # what the norms of the context and of the result start from
    tables = 2 * (context + blocks + blocks) * config.head_dim  # cosines and sines of keys, and of queries
    assert config.num_hidden_layers == 2
    assert sum(kept.values()) <= products + ends + tables


@pytest.mark.gpu
def test_one_plan_for_all_layers():
    class Plans(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.made += op is torch.ops.dflash_ext.block_attn_plan.default
            return op(*args, **kwargs or {})

    drafter, objective, *inputs = a_step("cuda", torch.bfloat16, num_layers=4)
    with Plans() as plans:
        gradients(objective, *inputs)
    assert plans.made == len(set(drafter.config.layer_types)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("gamma", [3.0, None])
def test_a_cuda_graph_holds_whole_steps(gamma):
    """Forward, backward and optimizer; the graph's inputs change between its replays."""
    drafter, objective, batch, features = a_step("cuda", torch.bfloat16, gamma=gamma)
    objective.max_rows = batch["labels"].numel()
    plain = copy.deepcopy(drafter)
    batches = [a_batch(objective.target, LENGTH, "cuda") for _ in range(4)]

    def step(objective, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss = objective(batch, features).losses.sum() / objective.divisor(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def take(index):
        for name, value in batches[index][0].items():
            batch[name].copy_(value)
        features.copy_(batches[index][1])

    graphed, eager = (
        partial(step, DFlashObjective(model, objective.target, gamma, objective.max_rows), optimizer)
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


@pytest.mark.parametrize(
    ("family", "loss", "mix", "first_slot"),
    [("llama", "kl", 1.0, 0), ("qwen3", "tv", 1.0, 1), ("gemma3", "kl", 0.3, 0), ("gemma3", "kl", 1.0, 1)],
)
def test_the_teacher_is_the_targets_own_distribution(family, loss, mix, first_slot):
    """Against the target's logits and the drafter's, block by block."""
    target, drafter = tiny_pair(family)
    drafter.config.sample_from_anchor = first_slot == 0
    objective = DFlashObjective(drafter, target, gamma=3.0, loss=loss, teacher_mix=mix)
    ids = [torch.randint(3, MASK_TOKEN, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 14, 9)]
    samples = [{"input_ids": row, "loss_mask": torch.ones_like(row, dtype=torch.bool), "key": (0, 0, 0)} for row in ids]
    found = []
    for pack_length in (None, 25):
        batch = AnchorCollator(7, 6, MASK_TOKEN, first_slot, pack_length=pack_length)(samples)
        found.append(objective(batch, *objective.of_target(batch)).losses.detach())
    per_block = [losses.sum(dim=-1)[losses.sum(dim=-1) > 0].sort().values for losses in found]
    torch.testing.assert_close(*per_block, rtol=1e-4, atol=1e-5)

    batch, losses = AnchorCollator(7, 6, MASK_TOKEN, first_slot)(samples), found[0]
    weights = position_decay(6, 3.0, first_slot)[first_slot:]
    for row, tokens in enumerate(ids):
        p = target.model(tokens[None]).logits[0].float().softmax(-1)
        features = target.features(tokens[None])
        for block in range(7):
            counts = batch["counts"][row, block, first_slot:]
            if not batch["keep"][row, block]:
                assert not losses[row, block].any()
                continue
            anchor = int(batch["anchors"][row, block])
            hidden = drafter(
                noise_embeds=drafter.embed(target, torch.tensor([[int(tokens[anchor])] + [MASK_TOKEN] * 5])),
                context_hidden_states=features[:, :anchor],
                position_ids=torch.arange(anchor + 6)[None],
            ).last_hidden_state
            logq = drafter.logits(target, hidden)[0, first_slot:].float().log_softmax(-1)
            for slot in range(len(counts)):
                expected = 0.0
                if counts[slot]:
                    teacher, label = p[anchor + slot], tokens[anchor + slot + 1]
                    kl = (teacher * (teacher.log() - logq[slot])).sum()
                    tv = (teacher - logq[slot].exp()).abs().sum() / 2
                    expected = weights[slot] * (mix * (kl if loss == "kl" else tv) - (1 - mix) * logq[slot, label])
                torch.testing.assert_close(losses[row, block, slot], torch.as_tensor(expected), rtol=1e-3, atol=1e-5)


def test_a_target_whose_logits_are_scaled_cannot_teach():
    target, drafter = tiny_pair("llama")
    target.model.lm_head.register_forward_hook(lambda _, __, logits: logits / 8)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot teach its distributions"):
        DFlashObjective(drafter, target, loss="kl")
