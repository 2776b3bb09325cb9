"""Block diffusion for language models: kernels, masks, and the drafters and decoders built on them."""

from .masks import IntervalMask

__version__ = "0.1.0"

__all__ = ["IntervalMask"]
