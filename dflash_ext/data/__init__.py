"""From a user's prompts to training samples: read them, encode them, let the target answer them, serve the answers."""

from .dataset import ResponseDataset
from .encoding import encode, encode_all, unused_template_args
from .errors import DataError, PromptError, PromptTooLong
from .left_out import LeftOut
from .prompts import Conversation, Message, read_conversations
from .responses import regenerate

__all__ = [
    "Conversation",
    "DataError",
    "LeftOut",
    "Message",
    "PromptError",
    "PromptTooLong",
    "ResponseDataset",
    "encode",
    "encode_all",
    "read_conversations",
    "regenerate",
    "unused_template_args",
]
