"""The public operators."""

from ..reference import CrossEntropy, Sample, Verification
from .attention import block_attn, block_attn_decode
from .kv import kv_inject
from .linear import linear
from .linear_loss import linear_cross_entropy
from .loss import masked_cross_entropy
from .penalties import count_tokens_
from .reveal import reveal, reveal_count
from .sampling import sample
from .sharded_loss import sharded_linear_cross_entropy
from .soft_embedding import sample_and_embed, soft_embedding
from .verify import verify

__all__ = [
    "CrossEntropy",
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
