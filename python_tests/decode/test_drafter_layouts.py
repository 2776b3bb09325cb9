"""Drafters of other layouts stay lossless: slot 0 drafts, or only some of the target's tokens can be drafted."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_ext.decode import Engine, decode
from dflash_ext.models import DFlashDrafter, Target, load_drafter, save_drafter
from python_tests.decode.oracle import Oracle, own_output, own_outputs
from python_tests.tiny import MASK_TOKEN, VOCAB, random_prompts, tiny_model, tiny_pair

PROMPTS = random_prompts(1, 5, 9, 17)
EVERY_THIRD = torch.arange(0, VOCAB, 3)


def with_reduced_vocabulary(drafter: DFlashDrafter, folder, drafted: torch.Tensor, head: torch.Tensor) -> DFlashDrafter:
    """The drafter, read again with a head [len(drafted), H] of its own for the tokens `drafted`."""
    save_drafter(drafter, folder)
    tensors = load_file(folder / "model.safetensors") | {
        "lm_head.weight": head,
        "d2t": drafted - torch.arange(len(head)),
    }
    save_file(tensors, folder / "model.safetensors")
    return load_drafter(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_output_is_the_targets(batch_size, tmp_path):
    target, drafter = tiny_pair("qwen3")
    expected = own_outputs(target.model, PROMPTS, 30)
    reduced = with_reduced_vocabulary(drafter, tmp_path, EVERY_THIRD, target.head[EVERY_THIRD].clone())
    drafter.config.sample_from_anchor = True
    for draft, width in ((drafter, 6), (reduced, 5)):
        decoded = decode(target, draft, PROMPTS, max_new_tokens=30, batch_size=batch_size)
        assert [completion.tokens for completion in decoded.completions] == expected
        assert len(decoded.acceptance) == width


def test_a_block_of_six_slots_that_all_draft_commits_seven_tokens():
    target, drafter = tiny_pair("llama")
    known = own_outputs(target.model, PROMPTS, 40)
    drafter.config.sample_from_anchor = True
    oracle = Oracle(drafter.config).eval()
    oracle.script(PROMPTS, known, 10**9)
    decoded = decode(target, oracle, PROMPTS, max_new_tokens=30, on_tokens=oracle.on_tokens)
    assert [completion.tokens for completion in decoded.completions] == [tokens[:30] for tokens in known]
    assert decoded.acceptance == [1.0] * 6
    assert all(completion.committed[:-1] == [7] * 4 for completion in decoded.completions)


def test_block_sizes_of_a_drafter_whose_slot_0_drafts():
    target, drafter = tiny_pair("llama")
    drafter.config.sample_from_anchor = True
    for block_size in (1, 3, 6):
        decoded = decode(target, drafter, PROMPTS, max_new_tokens=8, block_size=block_size)
        assert len(decoded.acceptance) == block_size
    with pytest.raises(ValueError, match="block size 0 is not supported: this drafter fills blocks of 1 to 6 slots"):
        decode(target, drafter, PROMPTS, max_new_tokens=8, block_size=0)


@torch.no_grad()
def test_slot_k_drafts_from_the_forward_that_training_sees(monkeypatch):
    """With `sample_from_anchor` the first drafted token is slot 0's choice."""
    target, drafter = tiny_pair("llama")
    drafter.config.sample_from_anchor = True
    (prompt,) = random_prompts(9)
    seen, logits = [], drafter.logits
    monkeypatch.setattr(drafter, "logits", lambda target, x, head: [seen.append(x), logits(target, x, head)][1])
    tokens = own_output(target.model, prompt, 2)
    decode(target, drafter, [prompt], max_new_tokens=8)
    features = target.features(torch.tensor([prompt]))
    block = torch.tensor([[tokens[0]] + [MASK_TOKEN] * 5])
    hidden = drafter(
        noise_embeds=drafter.embed(target, block),
        context_hidden_states=features,
        position_ids=torch.arange(len(prompt) + 6)[None],
    ).last_hidden_state
    assert seen[0].shape[1] == 6  # no seventh slot is computed
    torch.testing.assert_close(seen[0], hidden, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["sample_from_anchor", "reduced"])
def test_sampling_keeps_the_targets_distribution(layout, tmp_path):
    """The second and third token of many draws, against the target's own probabilities."""
    vocab, draws = 11, 4000
    torch.manual_seed(3)
    model = tiny_model("llama", vocab_size=vocab, num_hidden_layers=2, hidden_size=32, intermediate_size=32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    target = Target(model, [0])
    drafter = DFlashDrafter.for_target(target, mask_token_id=10, num_layers=1, taps=[0], block_size=3).eval()
    if layout == "reduced":
        drafted = torch.tensor([1, 2, 5, 8, 9])
        drafter = with_reduced_vocabulary(drafter, tmp_path, drafted, 6 * torch.randn(5, 32) * 32**-0.5)
    else:
        drafter.config.sample_from_anchor = True
    prompt = [3, 5, 4]
    decoded = decode(target, drafter, [prompt] * draws, max_new_tokens=3, temperature=0.9, batch_size=2000, seed=11)
    counts = torch.zeros(vocab, vocab, vocab)
    for completion in decoded.completions:
        counts[tuple(completion.tokens)] += 1
    # The target's own probabilities of all texts of three tokens.
    first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 0.9, dim=-1)
    texts = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    logits = model(torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)).logits[:, 3:5] / 0.9
    second, third = torch.softmax(logits, dim=-1).view(vocab, vocab, 2, vocab).unbind(2)
    expected = first[:, None, None] * second[:, 0, :][:, :, None] * third * draws
    # Chi-square over the texts that are expected often enough, the rest as one.
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (statistic, freedom)
    assert 0.02 < decoded.acceptance[0] < 0.98  # both branches of the rejection were taken


def test_drafts_on_a_cpu_read_the_head_in_bfloat16():
    """The target's own head stays as it is; drafts are those of the rounded head."""
    target, drafter = tiny_pair("llama")
    head = Engine(target, drafter, slots=1, max_length=32).cycle.draft.head
    assert head.dtype == torch.bfloat16 and target.head.dtype == torch.float32
    hidden = torch.randn(2, 3, target.hidden_size)
    logits = drafter.logits(target, hidden, head)
    assert logits.dtype == torch.float32 and torch.equal(logits, drafter.logits(target, hidden, head.float()))
    torch.testing.assert_close(logits, drafter.logits(target, hidden), rtol=0.02, atol=0.02)
