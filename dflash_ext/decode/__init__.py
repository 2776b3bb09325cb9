from .completion import Completion, Decoded
from .engine import Engine
from .request import Request
from .row_cache import RowCache
from .speculative import decode

__all__ = ["Completion", "Decoded", "Engine", "Request", "RowCache", "decode"]
