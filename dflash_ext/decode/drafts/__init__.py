"""Drafters on the engine: what each keeps of the tokens that are read, and how it fills a block."""

from .base import Draft
from .block import BlockDraft, UniformDraft
from .lora import GatedDraft, WholeDraft

__all__ = ["BlockDraft", "Draft", "GatedDraft", "UniformDraft", "WholeDraft"]
