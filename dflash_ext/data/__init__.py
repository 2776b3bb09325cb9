"""From a user's prompts to training samples: read them, encode them, let the target answer them, serve the answers."""

from .answers import answer_prompts
from .dataset import AnswerDataset
from .encoding import encode, encode_all, unused_template_args
from .errors import DataError, PromptError, PromptTooLong
from .left_out import LeftOut
from .prompts import Conversation, Message, read_conversations

__all__ = [
    "AnswerDataset",
    "Conversation",
    "DataError",
    "LeftOut",
    "Message",
    "PromptError",
    "PromptTooLong",
    "answer_prompts",
    "encode",
    "encode_all",
    "read_conversations",
    "unused_template_args",
]
