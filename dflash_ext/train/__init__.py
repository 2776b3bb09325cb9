from .anchors import Blocks, build_blocks, dpace, position_decay, sample_anchors
from .trainer import AnchorCollator, DFlashTrainer

__all__ = [
    "AnchorCollator",
    "Blocks",
    "DFlashTrainer",
    "build_blocks",
    "dpace",
    "position_decay",
    "sample_anchors",
]
