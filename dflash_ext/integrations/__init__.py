"""Connections to other packages and formats. Importing this module registers ``block_attn`` with transformers."""

from .attention import as_attention_mask, register

__all__ = ["as_attention_mask", "register"]

register()
