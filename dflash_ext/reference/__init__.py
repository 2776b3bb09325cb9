"""The definition of every operator in plain PyTorch, against which the kernels are tested: one file per file of ops/.

The functions take any floating dtype and compute in float32, or in float64 for float64 inputs. They are written to
be read, not to be fast.
"""

from .attention import block_attn, block_attn_decode
from .kv import kv_inject
from .linear import linear
from .linear_loss import linear_cross_entropy
from .loss import CrossEntropy, masked_cross_entropy
from .masks import decode_mask
from .penalties import penalised_logits
from .reveal import reveal, reveal_count, reveal_limit
from .sampling import Sample, filter_logits, sample
from .soft_embedding import soft_embedding
from .trained_layer import gated_linear, gated_pair, rms_norm, rotate_heads
from .verify import Verification, verify

__all__ = [
    "CrossEntropy",
    "Sample",
    "Verification",
    "block_attn",
    "block_attn_decode",
    "decode_mask",
    "filter_logits",
    "gated_linear",
    "gated_pair",
    "kv_inject",
    "linear",
    "linear_cross_entropy",
    "masked_cross_entropy",
    "penalised_logits",
    "reveal",
    "reveal_count",
    "reveal_limit",
    "rms_norm",
    "rotate_heads",
    "sample",
    "soft_embedding",
    "verify",
]
