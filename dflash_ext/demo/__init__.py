from .canvas import canvas_model
from .real import real_model
from .tiny import tiny_model

__all__ = ["canvas_model", "real_model", "tiny_model"]
