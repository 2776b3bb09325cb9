import json

import pytest

from dflash_ext.data import Conversation, DataError, Message, PromptTooLong, encode, read_conversations
from python_tests.data.letters import letters


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text):
    return (Message("user", text),)


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"prompt": "add 1 and 2", "answer": "3"}, user("add 1 and 2")),
        ({"question": "why?", "answer": "because"}, user("why?")),
        ({"turns": ["first", "second"]}, user("first")),
        ({"instruction": "translate", "output": "bonjour"}, user("translate")),
        ({"instruction": "translate", "input": "hello"}, user("translate\n\nhello")),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            user("hi"),
        ),
    ],
)
def test_rows_of_one_user_turn(tmp_path, row, messages):
    path = write(tmp_path / "a.jsonl", row, row)
    assert [c.messages for c in read_conversations(path)] == [messages] * 2


def test_every_user_turn_is_asked_after_its_history(tmp_path):
    said = ["system: be brief", "gpt: left over", "human: one", "gpt: two", "human: three", "gpt: four"]
    turns = [dict(zip(("from", "value"), turn.split(": "), strict=True)) for turn in said]
    asked = read_conversations(write(tmp_path / "a.jsonl", {"conversations": turns}))
    opening = (Message("system", "be brief"), Message("user", "one"))
    assert [c.messages for c in asked] == [
        opening,
        (*opening, Message("assistant", "two"), Message("user", "three")),
    ]


def test_a_json_array_of_rows_and_a_chosen_field(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "no", "problem": "yes"}, {"problem": ["one", "two"]}]))
    assert [c.messages for c in read_conversations(path, field="problem")] == [user("yes"), user("one")]


def test_limit_stops_before_the_rows_behind_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "one"}\n\n{"prompt": "two"}\nbroken\n', encoding="utf-8")
    assert [c.messages for c in read_conversations(path, limit=2)] == [user("one"), user("two")]


def test_plain_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * (37 * i % 160) for i in range(40)]
    path = tmp_path / "book.txt"
    path.write_bytes("\r\n \r\n".join(paragraphs).encode())
    documents = [c.text for c in read_conversations(path)]
    assert "".join("".join(documents).split()) == "".join("".join(paragraphs).split())
    assert all(len(document) <= 2000 and document.startswith("paragraph") for document in documents)
    assert all(len(document) > 900 for document in documents[:-1])


def test_text_without_any_gap_is_cut_all_the_same(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("x" * 4100)
    assert [len(c.text) for c in read_conversations(path)] == [2000, 2000, 100]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a.jsonl: the file is empty"),
        (b"\n\n", "a.jsonl: holds no prompt"),
        (b'{"prompt": "x"}\n{"prompt": \n', "a.jsonl:2: not valid JSON: Expecting value at column 11"),
        (b'{"prompt": "caf\xe9"}\n', r"a.jsonl:1: not UTF-8 \(byte 0xe9\)"),
        (b"[1, 2]\n", "a.jsonl:1: a JSON object is expected"),
        (
            b'{"id": 1, "body": "x"}\n',
            "a.jsonl:1: any of the keys messages, .*, text is expected; the row has \\['id', 'body'\\]",
        ),
        (b'{"prompt": " "}\n', "a.jsonl:1: 'prompt' is empty"),
        (b'{"prompt": 3}\n', "a.jsonl:1: 'prompt' is neither text nor a list of turns"),
        (
            b'{"messages": [{"role": "robot", "content": "x"}]}\n',
            "a.jsonl:1: 'messages' has the turn .*robot",
        ),
        (b'{"messages": [{"role": "user", "content": null}]}\n', "a.jsonl:1: 'messages' has the turn .*None"),
        (b'{"messages": []}\n', "a.jsonl: holds no prompt"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}\n', "a.jsonl:1: 'messages' has the turn .*user"),
        (b'{"prompt": "x"}\n{"prompt": ' + b"[" * 99_999, "a.jsonl:2: the JSON is nested too deeply"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", r"a.jsonl:1: 'prompt' has the turn \[\["),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "a.jsonl:1: a number has too many digits"),
        (b'{"prompt": "half \\ud83d of it"}\n', r"a.jsonl:1: a lone surrogate, '\\ud83d', which is half a character"),
        (b'{"two\\nlines": 1}\n', r"the row has \['two\\nlines'\]"),
        (b'{"instruction": "x", "input": ["y"]}\n', r"a.jsonl:1: 'input' is not text: \['y'\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_conversations(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_other_mistakes(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        read_conversations(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="a file is expected, this is a folder"):
        read_conversations(tmp_path)
    (tmp_path / "a.json").write_text('[{"prompt": "x"},\n {"prompt": }]')
    with pytest.raises(DataError, match="a.json: not valid JSON: Expecting value at line 2, column 13"):
        read_conversations(tmp_path / "a.json")
    with pytest.raises(DataError, match="a lone surrogate"):
        Conversation.user("not \udcff UTF-8 on the command line")
    path = write(tmp_path / "a.jsonl", {"prompt": "x"})
    with pytest.raises(DataError, match="a.jsonl:1: the key 'problem' is expected; the row has \\['prompt'\\]"):
        read_conversations(path, field="problem")
    with pytest.raises(DataError, match="limit is 0"):
        read_conversations(path, limit=0)
    binary = tmp_path / "image.txt"
    binary.write_bytes(b"fine\nfine\n\xff\xfe")
    with pytest.raises(DataError, match="image.txt: line 3: not UTF-8"):
        read_conversations(binary)


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
