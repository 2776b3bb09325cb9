from .adaptation import Adaptation, load_adaptation, save_adaptation
from .denoiser import Denoiser
from .denoiser_files import load_denoiser
from .drafter import DFlashDrafter
from .drafter_config import DFlashConfig, default_taps
from .drafter_files import load_drafter, save_drafter, save_speculators_drafter
from .loading import is_diffusion_gemma, load_target, stop_tokens
from .lora import LoraAdapter, LoraDrafter, is_lora_drafter, load_lora_drafter, save_lora_drafter
from .pairs import load_pair
from .probe import Verdict, probe
from .target import Target
from .uniform import UniformAdaptation

__all__ = [
    "Adaptation",
    "DFlashConfig",
    "DFlashDrafter",
    "Denoiser",
    "LoraAdapter",
    "LoraDrafter",
    "Target",
    "UniformAdaptation",
    "Verdict",
    "default_taps",
    "is_diffusion_gemma",
    "is_lora_drafter",
    "load_adaptation",
    "load_denoiser",
    "load_drafter",
    "load_lora_drafter",
    "load_pair",
    "load_target",
    "probe",
    "save_adaptation",
    "save_drafter",
    "save_lora_drafter",
    "save_speculators_drafter",
    "stop_tokens",
]
