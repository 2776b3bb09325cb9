"""From a user's prompts to training samples: reading, encoding, the target's answers, and the dataset of answers."""

from .answers import answer_prompts, conversation_numbers
from .dataset import AnswerDataset
from .encoding import encode, encode_all, unused_template_args
from .errors import DataError, PromptError, PromptTooLong
from .features import FeatureDataset, write_features
from .left_out import LeftOut
from .noised import NoiseCollator, check_blocks
from .prompts import Conversation, Message, read_conversations, read_references
from .server import Server
from .text import TextDataset, read_texts
from .uniform import UniformCollator

__all__ = [
    "AnswerDataset",
    "Conversation",
    "DataError",
    "FeatureDataset",
    "LeftOut",
    "Message",
    "NoiseCollator",
    "PromptError",
    "PromptTooLong",
    "Server",
    "TextDataset",
    "UniformCollator",
    "answer_prompts",
    "check_blocks",
    "conversation_numbers",
    "encode",
    "encode_all",
    "read_conversations",
    "read_references",
    "read_texts",
    "unused_template_args",
    "write_features",
]
