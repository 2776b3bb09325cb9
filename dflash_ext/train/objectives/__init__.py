from ..losses import Losses
from .denoising import DenoisingObjective
from .dflash import DFlashObjective
from .lora import LoraObjective
from .objective import Objective
from .uniform import UniformObjective

__all__ = ["DFlashObjective", "DenoisingObjective", "LoraObjective", "Losses", "Objective", "UniformObjective"]
