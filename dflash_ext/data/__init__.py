"""From a user's prompts to training samples: read them, let the target answer them, serve the answers."""

from .dataset import ResponseDataset
from .errors import DataError
from .prompts import Conversation, Message, PromptTooLong, encode, read_conversations
from .responses import regenerate

__all__ = [
    "Conversation",
    "DataError",
    "Message",
    "PromptTooLong",
    "ResponseDataset",
    "encode",
    "read_conversations",
    "regenerate",
]
