from ..losses import Losses
from .dflash import DFlashObjective
from .lora import LoraObjective
from .objective import Objective

__all__ = ["DFlashObjective", "LoraObjective", "Losses", "Objective"]
