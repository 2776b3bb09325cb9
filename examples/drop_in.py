"""A mask, block attention and a loss on chosen positions, as they drop into somebody else's training step."""

import torch

from dflash_ext import IntervalMask, block_attn, masked_cross_entropy

B, heads, kv_heads, length, width, vocab = 2, 8, 2, 96, 64, 1000
q = torch.randn(B, heads, length, width, requires_grad=True)
k, v = (torch.randn(B, kv_heads, length, width, requires_grad=True) for _ in range(2))
mask = IntervalMask.prefix_block(length, prefix_len=64)  # a causal prefix, then a bidirectional block
hidden = block_attn(q, k, v, mask).transpose(1, 2).flatten(2)

logits = hidden @ torch.randn(heads * width, vocab)
target = torch.randint(vocab, (B, length))
weight = (torch.arange(length) >= 64).float().expand(B, length)  # only the block counts
result = masked_cross_entropy(logits, target, weight)
result.loss.backward()
print(f"loss {result.loss:.3f}, accuracy {result.correct[:, 64:].float().mean():.3f}")
