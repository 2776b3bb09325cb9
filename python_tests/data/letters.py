"""A tokenizer with a token for each printable ASCII character, ids 3 to 95 as in the tiny targets."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def letters(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    special = {"<unk>": 0, "<bos>": 1, "<eos>": 2}
    vocab = special | {chr(code): code - 32 + 3 for code in range(32, 124)} | {"\n": 95}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer
