from .anchors import Blocks, build_blocks, dpace, position_decay, sample_anchors
from .curve import plot_curve
from .recipe import Recipe
from .reporting import summary
from .run import save_drafter, train_drafter, train_on_answers, train_on_prompts
from .trainer import AnchorCollator, DFlashTrainer

__all__ = [
    "AnchorCollator",
    "Blocks",
    "DFlashTrainer",
    "Recipe",
    "build_blocks",
    "dpace",
    "plot_curve",
    "position_decay",
    "sample_anchors",
    "save_drafter",
    "summary",
    "train_drafter",
    "train_on_answers",
    "train_on_prompts",
]
