from ..losses import Losses
from .dflash import DFlashObjective
from .objective import Objective

__all__ = ["DFlashObjective", "Losses", "Objective"]
