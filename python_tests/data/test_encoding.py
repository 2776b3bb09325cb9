import pytest

from dflash_ext.data import (
    Conversation,
    DataError,
    LeftOut,
    Message,
    PromptTooLong,
    encode,
    encode_all,
    unused_template_args,
)
from python_tests.data.letters import CHAT_TEMPLATE, letters


def user(text):
    return (Message("user", text),)


def test_encode_ends_where_the_answer_starts():
    tokenizer = letters()
    history = Conversation(messages=(*user("1+1"), Message("assistant", "2"), *user("+1")))
    assert tokenizer.decode(encode(history, tokenizer, max_prompt_tokens=99)) == "u:1+1;a:2;u:+1;a:"
    plain = encode(history, letters(None), max_prompt_tokens=99)
    assert tokenizer.decode(plain) == "1+1\n\n2\n\n+1"


def test_encode_leaves_most_of_a_document_to_the_target():
    tokenizer = letters()
    text = "abcdefgh" * 30
    lengths = [len(encode(Conversation(text=text[:n]), tokenizer, max_prompt_tokens=99)) for n in (1, 9, 240)]
    assert lengths == [1, 4, 64]
    assert tokenizer.decode(encode(Conversation(text=text), tokenizer, max_prompt_tokens=10)) == text[:10]


def test_encode_refuses_in_one_line():
    tokenizer = letters()
    with pytest.raises(PromptTooLong, match="a prompt has 10 tokens, at most 9 are allowed: 'hello'"):
        encode(Conversation.user("hello"), tokenizer, max_prompt_tokens=9)
    system = Conversation(messages=(Message("system", "x"), *user("y")))
    with pytest.raises(DataError, match="chat template refuses .*: no system here"):
        encode(system, tokenizer, max_prompt_tokens=9)
    with pytest.raises(DataError, match="chat template refuses .*: division by zero"):
        encode(Conversation.user("x"), letters("{{ 1 / 0 }}"), max_prompt_tokens=9)
    with pytest.raises(DataError, match="the tokenizer refuses 'half .ud83d of it'"):
        encode(Conversation(text="half \ud83d of it"), tokenizer, max_prompt_tokens=9)


def test_prompts_that_cannot_be_encoded_are_left_out_and_counted():
    system = Conversation(messages=(Message("system", "x"), *user("y")))
    texts = ["one", "x" * 20, "two", "y" * 30, "half \ud83d of it"]
    conversations = [*map(Conversation.user, texts), system, Conversation(text="z" * 60)]
    left_out = LeftOut()
    prompts = encode_all(conversations, letters(), max_prompt_tokens=10, left_out=left_out)
    assert {index: letters().decode(ids) for index, ids in prompts.items()} == {
        0: "u:one;a:",
        2: "u:two;a:",
        6: "z" * 10,
    }
    refusal = "prompts that the chat template refuses: "
    assert left_out.pop("prompts of more than 10 tokens") == 2
    assert left_out.pop(refusal + "no system here") == 1
    assert len(left_out) == 1 and next(iter(left_out)).startswith(refusal)
    with pytest.raises(PromptTooLong, match="a prompt has 25 tokens"):
        encode_all(conversations[1:2], letters(), max_prompt_tokens=10)


def test_chat_template_args_reach_the_template():
    tokenizer = letters(CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}")
    ids = encode(Conversation.user("x"), tokenizer, max_prompt_tokens=9, chat_template_args={"enable_thinking": False})
    assert tokenizer.decode(ids) == "u:x;a:no"
    assert unused_template_args(tokenizer, {"enable_thinking": False, "thinking_budget": 1}) == ["thinking_budget"]
    assert unused_template_args(letters(None), {"enable_thinking": False}) == ["enable_thinking"]
