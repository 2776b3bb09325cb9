from ..losses import Losses
from .denoising import DenoisingObjective
from .dflash import DFlashObjective
from .drafting import DraftingObjective
from .lora import LoraObjective
from .objective import Objective
from .uniform import UniformObjective

__all__ = [
    "DFlashObjective",
    "DenoisingObjective",
    "DraftingObjective",
    "LoraObjective",
    "Losses",
    "Objective",
    "UniformObjective",
]
