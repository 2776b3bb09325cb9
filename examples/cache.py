"""Attention of a drafter's block against a key and value cache, contiguous and paged. The rows have unequal lengths."""

import torch

from dflash_ext import IntervalMask, block_attn_decode

B, heads, kv_heads, width, capacity, page_size = 2, 8, 2, 64, 64, 16
cached = torch.tensor([40, 17])  # tokens before each row's block; the block's keys are in the cache, too
mask = IntervalMask.decode(cached, block_len=16, kv_len=capacity)  # causal=True to verify a block
q = torch.randn(B, heads, 16, width)
k_cache, v_cache = (torch.randn(B, kv_heads, capacity, width) for _ in range(2))
out = block_attn_decode(q, k_cache, v_cache, mask)

k_pages, v_pages = (x.transpose(1, 2).reshape(-1, page_size, kv_heads, width) for x in (k_cache, v_cache))
block_table = torch.arange(len(k_pages), dtype=torch.int32).view(B, -1)
paged = block_attn_decode(q, k_pages, v_pages, mask, block_table=block_table)
print(f"{list(out.shape)}, in pages the same: {torch.equal(out, paged)}")
