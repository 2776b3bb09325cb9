"""Block diffusion in BD3-LM's manner (arXiv 2503.09573): one pass over `[x_t ; x_0]`, then decoding block by block."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import dflash_ext.integrations  # noqa: F401  registers "block_attn"
from dflash_ext import IntervalMask, masked_cross_entropy

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
vocab, mask_token, length, block = 20, 19, 16, 4
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocab, **shape), attn_implementation="block_attn")
# A noised block sees itself and the clean blocks before it.
mask = IntervalMask.block_diffusion(length, block)
positions = torch.arange(length).repeat(2)[None]


def batch(size: int) -> torch.Tensor:
    """Sequences that count from a random number, modulo 19."""
    return (torch.randint(mask_token, (size, 1)) + torch.arange(length)) % mask_token


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(steps):
    clean = batch(32)
    t = torch.rand(len(clean), length // block).clamp(min=0.05).repeat_interleave(block, dim=1)  # a rate for each block
    masked = torch.rand(clean.shape) < t
    rows = torch.cat([clean.masked_fill(masked, mask_token), clean], dim=1)
    logits = model(rows, position_ids=positions, interval_mask=mask).logits[:, :length]
    loss = masked_cross_entropy(logits, clean, masked / t, normaliser=clean.numel()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss:.3f}")

answers = batch(8)
tokens = answers[:, :block]  # the prompt
with torch.no_grad():
    while tokens.shape[1] < length:
        canvas = torch.full((len(tokens), block), mask_token)
        done = tokens.shape[1]
        causal_in_blocks = IntervalMask.block_causal(done + block, block)
        for column in range(block):  # a token at a time, from left to right
            logits = model(torch.cat([tokens, canvas], dim=1), interval_mask=causal_in_blocks).logits
            canvas[:, column] = logits[:, done + column, :mask_token].argmax(dim=-1)
        tokens = torch.cat([tokens, canvas], dim=1)
print(f"{(tokens == answers)[:, block:].float().mean():.0%} of the tokens are right")
