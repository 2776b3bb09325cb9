"""Block diffusion for language models: kernels, masks, and the drafters and decoders built on them."""

from .masks import IntervalMask
from .ops import (
    CrossEntropy,
    Sample,
    Verification,
    block_attn,
    block_attn_decode,
    count_tokens_,
    kv_inject,
    linear,
    linear_cross_entropy,
    masked_cross_entropy,
    reveal,
    reveal_count,
    sample,
    sample_and_embed,
    sharded_linear_cross_entropy,
    soft_embedding,
    verify,
)

__version__ = "0.1.0"

__all__ = [
    "CrossEntropy",
    "IntervalMask",
    "Sample",
    "Verification",
    "block_attn",
    "block_attn_decode",
    "count_tokens_",
    "kv_inject",
    "linear",
    "linear_cross_entropy",
    "masked_cross_entropy",
    "reveal",
    "reveal_count",
    "sample",
    "sample_and_embed",
    "sharded_linear_cross_entropy",
    "soft_embedding",
    "verify",
]
