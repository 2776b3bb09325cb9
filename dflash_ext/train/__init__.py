from ..models import save_drafter
from .anchors import Blocks, build_blocks, dpace, position_decay, sample_anchors
from .collator import AnchorCollator
from .curve import plot_curve
from .denoisers import train_denoiser
from .drafters import train_drafter, train_on_answers, train_on_prompts
from .evaluation import DraftingEvaluation, Evaluation, HeldOutPrompts
from .randomness import new_drafter, new_lora_drafter
from .recipe import LoraRecipe, Recipe, RunRecipe
from .run import run
from .trainer import ObjectiveTrainer

__all__ = [
    "AnchorCollator",
    "Blocks",
    "DraftingEvaluation",
    "Evaluation",
    "HeldOutPrompts",
    "LoraRecipe",
    "ObjectiveTrainer",
    "Recipe",
    "RunRecipe",
    "build_blocks",
    "dpace",
    "new_drafter",
    "new_lora_drafter",
    "plot_curve",
    "position_decay",
    "run",
    "sample_anchors",
    "save_drafter",
    "train_denoiser",
    "train_drafter",
    "train_on_answers",
    "train_on_prompts",
]
