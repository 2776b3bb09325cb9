from ..losses import Losses
from .denoising import DenoisingObjective
from .dflash import DFlashObjective
from .lora import LoraObjective
from .objective import Objective

__all__ = ["DFlashObjective", "DenoisingObjective", "LoraObjective", "Losses", "Objective"]
