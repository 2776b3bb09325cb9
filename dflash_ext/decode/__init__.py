from .cache import RowCache
from .completion import Completion, Decoded
from .speculative import decode

__all__ = ["Completion", "Decoded", "RowCache", "decode"]
