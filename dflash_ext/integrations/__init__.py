"""Bridges to other people's formats and packages. Importing this registers ``block_attn`` with transformers."""

from .attention import as_attention_mask, register

__all__ = ["as_attention_mask", "register"]

register()
