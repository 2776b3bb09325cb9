from .real import real_model
from .tiny import tiny_model

__all__ = ["real_model", "tiny_model"]
