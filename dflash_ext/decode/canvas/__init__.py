"""Diffusion over a canvas of tokens: masked, as of an adapted causal LM, and uniform-state, as of DiffusionGemma."""

from .completion import CanvasCompletion, CanvasDecoded, Step
from .decode import decode_canvas
from .processes import MaskedDiffusion, UniformDiffusion, process_of

__all__ = [
    "CanvasCompletion",
    "CanvasDecoded",
    "MaskedDiffusion",
    "Step",
    "UniformDiffusion",
    "decode_canvas",
    "process_of",
]
