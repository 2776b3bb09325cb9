from .completion import Completion, Decoded
from .engine import Engine
from .kinds import Drafter
from .request import Request
from .speculative import decode

__all__ = ["Completion", "Decoded", "Drafter", "Engine", "Request", "decode"]
