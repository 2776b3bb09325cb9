from ..models import save_drafter
from .anchors import Blocks, build_blocks, dpace, position_decay, sample_anchors
from .collator import AnchorCollator
from .curve import plot_curve
from .evaluation import Evaluation, HeldOutPrompts
from .randomness import new_drafter
from .recipe import Recipe
from .reporting import summary
from .run import train_drafter, train_on_answers, train_on_prompts
from .trainer import DFlashTrainer

__all__ = [
    "AnchorCollator",
    "Blocks",
    "DFlashTrainer",
    "Evaluation",
    "HeldOutPrompts",
    "Recipe",
    "build_blocks",
    "dpace",
    "new_drafter",
    "plot_curve",
    "position_decay",
    "sample_anchors",
    "save_drafter",
    "summary",
    "train_drafter",
    "train_on_answers",
    "train_on_prompts",
]
