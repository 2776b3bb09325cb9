import json

import peft
import pytest
import torch
from transformers import masking_utils

from dflash_ext.data import NoiseCollator
from dflash_ext.decode import decode
from dflash_ext.models import Adaptation, Target, load_adaptation, save_adaptation
from dflash_ext.reference.numerics import softcapped
from python_tests.tiny import MASK_TOKEN, VOCAB, random_prompts, tiny_gemma4, tiny_model


def target_of(family):
    target = Target(tiny_gemma4() if family == "gemma4" else tiny_model(family))
    target.decoder.set_attn_implementation("block_attn")
    return target


def adaptation_of(family, **options):
    """An adaptation whose adapter changes something. Full weights are those of the base."""
    adaptation = Adaptation.for_target(target_of(family), **{"mask_id": MASK_TOKEN, "rank": 4} | options)
    for half in getattr(adaptation.adapter, "lora_b", ()):
        torch.nn.init.normal_(half, std=0.1, generator=torch.Generator().manual_seed(half.numel()))
    return adaptation


def batch_of(rows=2, length=20):
    ids = torch.randint(3, MASK_TOKEN, (rows, length), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 11])
    return NoiseCollator()([{"input_ids": row, "starts": starts, "key": (0, 0, i)} for i, row in enumerate(ids)])


def states(adaptation, batch):
    with torch.no_grad():
        return adaptation(*adaptation.inputs(batch))


FAMILIES = ["llama", "gemma3", "gemma4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_embedding_stands_in_for_hidden_tokens(family):
    """With the embedding of a token in its place, hiding is the same as putting that token there."""
    adaptation, batch = adaptation_of(family), batch_of()
    ids, hidden, positions, masks, _ = adaptation.inputs(batch)
    embedding = adaptation.target.model.get_input_embeddings()
    start = embedding(torch.tensor([MASK_TOKEN]))[0]
    torch.testing.assert_close(adaptation.mask_embedding.detach(), start)  # a scale of the embedding is in it
    with torch.no_grad():
        given = adaptation(ids.masked_fill(hidden, MASK_TOKEN), torch.zeros_like(hidden), positions, masks)
        torch.testing.assert_close(states(adaptation, batch), given)
        adaptation.mask_embedding += 1
        assert (states(adaptation, batch) - given).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", ["causal", "prefix_block", "block_causal"])
def test_hidden_tokens_are_not_read(family, pattern):
    size = 64 if pattern == "block_causal" else None  # one block, whose right tokens nothing reads
    adaptation, batch = adaptation_of(family, pattern=pattern, block_size=size), batch_of()
    before = states(adaptation, batch)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["hidden"], 7)}
    after = states(adaptation, other)
    length = batch["input_ids"].shape[1]
    torch.testing.assert_close(after[:, :length], before[:, :length])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_implementations_get_a_dense_mask(family, implementation):
    adaptation, batch = adaptation_of(family), batch_of()
    ours = states(adaptation, batch)
    adaptation.target.decoder.set_attn_implementation(implementation)
    torch.testing.assert_close(states(adaptation, batch), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_makes_no_mask_beside_the_given_ones(family, monkeypatch):
    """It would make one for all pairs of tokens where positions start anew, and wait for the device."""
    made = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: made.append(1))
    adaptation, batch = adaptation_of(family), batch_of()
    states(adaptation, batch)
    adaptation.base_states(batch)
    assert not made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_has_the_same_states_alone_and_packed(family):
    adaptation, batch = adaptation_of(family), batch_of(1)
    alone = {name: row[:, 11:] for name, row in batch.items()}
    alone |= {name: alone[name] - 11 for name in ("starts", "ends", "blocks")}
    torch.testing.assert_close(states(adaptation, alone), states(adaptation, batch)[:, 11:], atol=1e-4, rtol=1e-4)


def test_the_base_stays_as_it_is():
    adaptation, batch = adaptation_of("gemma4"), batch_of()
    model = adaptation.target.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = adaptation.base_states(batch)
    loss = adaptation(*adaptation.inputs(batch)).square().sum()
    loss.backward()
    assert torch.equal(adaptation.base_states(batch), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in adaptation.parameters())
    assert all(path.startswith("model.language_model.layers.") for path in adaptation.adapter.paths)


PATTERNS = [{"pattern": "prefix_block"}, {"pattern": "block_causal", "block_size": 4}]


@pytest.mark.parametrize("options", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gated_adapter_leaves_right_tokens_to_the_base(family, options):
    """Those before a block, or the right copy of a row; and it acts on all tokens of blocks, hidden or not."""
    adaptation, batch = adaptation_of(family, kind="gated", **options), batch_of()
    plain, length = adaptation.base_states(batch), batch["input_ids"].shape[1]
    in_block = torch.arange(length) >= batch["blocks"]
    got = states(adaptation, batch)
    right = got[:, length:] if "block_size" in options else got[:, :length][~in_block]
    wanted = plain if "block_size" in options else plain[~in_block]
    torch.testing.assert_close(right, wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for half in adaptation.adapter.lora_b:
            half.zero_()
    changed = (states(adaptation, batch) - got)[:, :length].abs().amax(-1)
    assert (changed[in_block] > 1e-4).all()


@pytest.mark.parametrize("options", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_weights_begin_as_the_base_and_all_of_them_are_trained(family, options):
    adaptation, batch = adaptation_of(family, kind="full", **options), batch_of()
    model, target = adaptation.target.model, adaptation.target
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = Adaptation.for_target(target_of(family), mask_id=MASK_TOKEN, rank=1, **options)
    torch.testing.assert_close(states(adaptation, batch), states(new, batch))
    found = adaptation(*adaptation.inputs(batch))
    torch.nn.functional.linear(found, adaptation.head).logsumexp(-1).sum().backward()
    towers = [name for name, _ in model.named_parameters() if "vision" in name or "audio" in name]
    assert {*adaptation.adapter.paths, *towers} == {name for name, _ in model.named_parameters()}
    for path, weight in zip(adaptation.adapter.paths, adaptation.adapter.weights, strict=True):
        assert weight.grad is not None and weight.grad.isfinite().all(), path
        assert weight.grad.abs().max() > 0 or "layer_scalar" in path, path
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        for weight in adaptation.adapter.weights:
            weight.mul_(1.5)
    assert (states(adaptation, batch) - found).abs().max() > 1e-2
    torch.testing.assert_close(adaptation.head, 1.5 * target.head)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_base_states_predict_the_next_token_as_the_base_does():
    adaptation, batch = adaptation_of("llama"), batch_of(1)
    document = batch["input_ids"][:, 11:]
    model = adaptation.target.model
    logits = model.lm_head(adaptation.base_states(batch)[:, 11:])
    torch.testing.assert_close(logits, model(document).logits, atol=1e-4, rtol=1e-4)


def test_a_new_mask_token():
    adaptation, batch = adaptation_of("gemma3", mask_id=VOCAB), batch_of()
    embedding = adaptation.target.model.get_input_embeddings()
    mean = embedding(torch.arange(VOCAB)).mean(0)
    torch.testing.assert_close(adaptation.mask_embedding.detach(), mean, atol=1e-5, rtol=1e-4)
    assert states(adaptation, batch).isfinite().all()
    with pytest.raises(ValueError, match="mask token 98: the base has 97 tokens"):
        adaptation_of("gemma3", mask_id=VOCAB + 1)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_files(tmp_path, family):
    adaptation, batch = adaptation_of(family, pattern="block_causal", context="block_causal", block_size=4), batch_of()
    save_adaptation(adaptation, tmp_path, base_name="a/base")
    again = load_adaptation(tmp_path, target_of(family))
    assert again.config == adaptation.config
    torch.testing.assert_close(states(again, batch), states(adaptation, batch))
    # PEFT reads the adapter unchanged.
    model = peft.PeftModel.from_pretrained(target_of(family).model, tmp_path)
    wrapped = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == set(adaptation.adapter.paths)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_full_weights(tmp_path, family):
    """transformers reads them as a model, in which the head is tied to the embedding as it was."""
    adaptation, batch = adaptation_of(family, kind="full"), batch_of()
    with torch.no_grad():
        for weight in adaptation.adapter.weights:
            weight.mul_(1.1)
    save_adaptation(adaptation, tmp_path)
    again = load_adaptation(tmp_path, target_of(family))
    torch.testing.assert_close(states(again, batch), states(adaptation, batch))
    torch.testing.assert_close(again.head, adaptation.head)
    model = type(adaptation.target.model).from_pretrained(tmp_path)
    document = batch["input_ids"][:1, 11:]
    want = adaptation_of(family, kind="full", pattern="causal")
    want.load_state_dict(adaptation.state_dict())
    bounds = {name: torch.zeros_like(document, dtype=torch.int32) for name in ("starts", "blocks")}
    bounds |= {"ends": bounds["starts"] + document.shape[1], "hidden": torch.zeros_like(document, dtype=torch.bool)}
    logits = torch.nn.functional.linear(states(want, bounds | {"input_ids": document}), want.head)
    torch.testing.assert_close(model(document).logits, softcapped(logits, want.target.softcap), atol=1e-4, rtol=1e-4)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot read the full weights in"):
        load_adaptation(tmp_path, target_of(family))


def test_files_that_do_not_fit(tmp_path):
    save_adaptation(adaptation_of("llama"), tmp_path)
    with pytest.raises(ValueError, match="made for another base: its class is 'LlamaForCausalLM', this model's is"):
        load_adaptation(tmp_path, target_of("gemma3"))
    trained_on = target_of("llama")
    with torch.no_grad():
        trained_on.model.model.norm.weight[0] += 0.5
    with pytest.raises(ValueError, match="made for another base: its weights is '.*', this model's is '.*'"):
        load_adaptation(tmp_path, trained_on)
    with pytest.raises(ValueError, match="no denoiser in .*: there is no denoiser.json"):
        load_adaptation(tmp_path / "nowhere", target_of("llama"))
    settings = json.loads((tmp_path / "denoiser.json").read_text())
    (tmp_path / "denoiser.json").write_text(json.dumps(settings | {"pattern": "diagonal"}))
    with pytest.raises(ValueError, match="cannot read the denoiser in .*: pattern is 'diagonal'"):
        load_adaptation(tmp_path, target_of("llama"))
    (tmp_path / "denoiser.json").write_text(json.dumps(settings))
    (tmp_path / "denoiser.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the denoiser in"):
        load_adaptation(tmp_path, target_of("llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "block_causal"}, "the pattern block_causal needs a block size"),
        ({"block_size": 4}, "goes with the pattern block_causal alone, and the pattern is prefix_block"),
        ({"context": "block_causal"}, "with the pattern prefix_block the context is causal"),
        ({"context": "full"}, "context is 'full': causal, block_causal are supported"),
        ({"targets": "c_attn"}, "no linear layer c_attn"),
        ({"kind": "half"}, "kind is 'half': whole, gated, full are supported"),
        (
            {"kind": "gated", "pattern": "block_causal", "block_size": 4, "context": "block_causal"},
            "a gated denoiser's context is causal",
        ),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        adaptation_of("llama", **options)


@pytest.mark.parametrize(("family", "kind", "graphs"), [("llama", "whole", 1), ("gemma3", "gated", 2)])
def test_compiled_layers_of_a_kind_share_a_graph(family, kind, graphs):
    """And the base stays without the adapter, whose halves are read anew in each step."""
    adaptation, batch = adaptation_of(family, kind=kind), batch_of()

    def gradients():
        adaptation.zero_grad()
        found = adaptation(*adaptation.inputs(batch))
        (found * torch.cos(torch.arange(found.numel())).view(found.shape)).sum().backward()
        return [found.detach(), *(parameter.grad for parameter in adaptation.parameters())]

    want, base = gradients(), adaptation.base_states(batch)
    torch._dynamo.utils.counters.clear()
    adaptation.compile(backend="aot_eager")
    for got, wanted in zip(gradients(), want, strict=True):
        assert (got - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert torch.equal(adaptation.base_states(batch), base)
    with torch.no_grad():
        for half in adaptation.adapter.lora_b:
            half.mul_(2)
    again = gradients()[0]
    assert (again - want[0]).abs().max() > 1e-3
    adaptation._compiled = None
    torch.testing.assert_close(again, states(adaptation, batch), atol=1e-3, rtol=1e-3)


def test_full_weights_are_not_compiled():
    with pytest.raises(ValueError, match="torch.compile is supported with an adapter, and not with full weights"):
        adaptation_of("llama", kind="full").compile()


@pytest.mark.parametrize("kind", ["whole", "gated"])
@pytest.mark.parametrize("pattern", ["causal", "prefix_block"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_denoiser_drafts_for_its_base(tmp_path, family, pattern, kind):
    """The drafted tokens are what the denoiser fills in behind the anchor, and the base's output stays as it is.

    Prompt and block fit into the window of Gemma's layers. Beyond it, each row of a drafted block has its own context.
    """
    adaptation, prompts = adaptation_of(family, pattern=pattern, kind=kind), random_prompts(3, 2, 1)
    save_adaptation(adaptation, tmp_path)
    target = Target(adaptation.target.model)
    plain = decode(target, None, prompts, max_new_tokens=12)
    drafted = decode(target, tmp_path, prompts, max_new_tokens=12, block_size=5)
    for prompt, got, want in zip(prompts, drafted.completions, plain.completions, strict=True):
        assert got.tokens == want.tokens
        tokens, bounds = torch.tensor([[*prompt, want.tokens[0], 0, 0, 0, 0]]), {}
        for name, value in (("starts", 0), ("ends", tokens.shape[1]), ("blocks", len(prompt) + (kind == "gated"))):
            bounds[name] = torch.full(tokens.shape, value, dtype=torch.int32)
        hidden = torch.arange(tokens.shape[1])[None] > len(prompt)
        logits = states(adaptation, bounds | {"input_ids": tokens, "hidden": hidden}) @ target.head.T
        logits[..., MASK_TOKEN] = -torch.inf
        assert got.drafted[0] == logits[0, -4:].argmax(-1).tolist()
