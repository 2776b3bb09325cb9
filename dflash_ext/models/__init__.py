from .drafter import DFlashDrafter
from .drafter_config import DFlashConfig, default_taps
from .drafter_files import load_drafter, save_drafter
from .loading import load_target, stop_tokens
from .target import Target

__all__ = [
    "DFlashConfig",
    "DFlashDrafter",
    "Target",
    "default_taps",
    "load_drafter",
    "load_target",
    "save_drafter",
    "stop_tokens",
]
