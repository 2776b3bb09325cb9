"""LoRA adapters beside a causal LM, and the drafters made of them."""

from .adapter import LoraAdapter
from .config import LoraDrafterConfig
from .drafter import LoraDrafter
from .files import is_lora_drafter, load_lora_drafter, save_lora_drafter
from .peft_files import load_adapter, save_adapter
from .rows import read_context
from .sampler import SamplerHead
from .targets import PRESETS, linear_paths
from .tensor_parallel import share_layers

__all__ = [
    "PRESETS",
    "LoraAdapter",
    "LoraDrafter",
    "LoraDrafterConfig",
    "SamplerHead",
    "is_lora_drafter",
    "linear_paths",
    "load_adapter",
    "load_lora_drafter",
    "read_context",
    "save_adapter",
    "save_lora_drafter",
    "share_layers",
]
