from .completion import Completion, Decoded
from .engine import Engine
from .request import Request
from .speculative import decode

__all__ = ["Completion", "Decoded", "Engine", "Request", "decode"]
