from .dflash import BlockLosses, DFlashObjective

__all__ = ["BlockLosses", "DFlashObjective"]
