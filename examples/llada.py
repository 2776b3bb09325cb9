"""Masked diffusion in LLaDA's manner (arXiv 2502.09992): the 1/t loss, and decoding by confidence."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import dflash_ext.integrations  # noqa: F401  registers "block_attn"
from dflash_ext import IntervalMask, masked_cross_entropy, reveal, sample
from dflash_ext.ops import reveal_count

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
vocab, mask_token, length = 20, 19, 16
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocab, **shape), attn_implementation="block_attn")
both_ways = IntervalMask.full(length)  # every token sees every token


def batch(size: int) -> torch.Tensor:
    """Sequences that count from a random number, modulo 19."""
    return (torch.randint(mask_token, (size, 1)) + torch.arange(length)) % mask_token


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(steps):
    tokens = batch(32)
    t = torch.rand(len(tokens), 1).clamp(min=0.05)  # the share of a sequence that is masked
    masked = torch.rand(tokens.shape) < t
    logits = model(tokens.masked_fill(masked, mask_token), interval_mask=both_ways).logits
    loss = masked_cross_entropy(logits, tokens, masked / t, normaliser=tokens.numel()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss:.3f}")

answers = batch(8)
canvas = answers.clone()
canvas[:, 4:] = mask_token  # four tokens are the prompt
never_mask = torch.zeros(vocab).index_fill(0, torch.tensor(mask_token), -torch.inf)
total = (canvas == mask_token).sum(dim=1)
with torch.no_grad():
    for step in range(6):
        masked = canvas == mask_token
        logits = model(canvas, interval_mask=both_ways).logits
        drawn, confidence = sample(logits, seed=step, temperature=0.0, logit_bias=never_mask, return_confidence=True)
        chosen = reveal(confidence, masked, count=reveal_count(total, step, 6))
        canvas = torch.where(chosen, drawn.token, canvas)
print(f"{(canvas == answers)[:, 4:].float().mean():.0%} of the tokens are right after 6 steps of 2 tokens")
