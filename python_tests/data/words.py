"""A tokenizer with a token for each of the words w000, w001, ... and no chat template."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer(size: int = 97, eos: str = "w002", bos: str | None = None) -> PreTrainedTokenizerFast:
    """bos: the word that begins every text; None for none."""
    words = {f"w{i:03}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w000"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="w000")
