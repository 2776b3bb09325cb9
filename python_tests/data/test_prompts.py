import json

import pytest

from dflash_ext.data import DataError, LeftOut, Message, read_conversations


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


TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
MESSAGES = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "text", "text": "is it raining?"}]},
    TOOL_CALL,
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "and here?"}]},
    {"role": "user", "content": None},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("key", ["messages", "conversations", "turns", "prompt", "question", "instruction", "text"])
def test_turns_that_cannot_be_read_are_left_out_and_counted(tmp_path, key, suffix):
    """Under every key, in both formats, and without a word against the rows beside them."""
    sharegpt = [{"from": who, "value": who} for who in ("narrator", "Human", "bing", "user", "observation")]
    rows = [{"prompt": "first"}, {key: MESSAGES}, {key: sharegpt}, {key: [TOOL_CALL]}, {"prompt": "last"}]
    path = tmp_path / f"a{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    left_out = LeftOut()
    asked = [c.messages for c in read_conversations(path, left_out=left_out)]
    opening = (Message("system", "be brief"), Message("user", "look\nis it raining?"))
    assert asked == [
        user("first"),
        opening,
        (*opening, Message("assistant", "yes"), Message("user", "and here?")),
        user("Human"),
        (*user("Human"), Message("assistant", "bing"), Message("user", "user")),
        user("last"),
    ]
    assert left_out == {
        "turns without text": 3,
        "turns of role 'tool'": 1,
        "parts of type 'image_url'": 1,
        "turns of role 'narrator'": 1,
        "turns of role 'observation'": 1,
        "conversations in which no user speaks": 1,
    }
    assert str(left_out).startswith("turns without text (3), turns of role 'tool' (1), ")


@pytest.mark.parametrize(
    "turn",
    [
        {"role": None, "content": None, "from": "human", "value": "hi"},
        {"role": "user", "content": None, "from": None, "value": "hi"},
        {"role": " User\n", "content": {"type": "text", "text": "hi"}},
        {"role": "user", "parts": [{"text": "hi"}]},
    ],
)
def test_turns_of_other_forms(tmp_path, turn):
    """Of a table that fills missing keys with null, with one part alone, and as Gemini has them."""
    left_out = LeftOut()
    path = write(tmp_path / "a.jsonl", {"messages": [turn]})
    assert [c.messages for c in read_conversations(path, left_out=left_out)] == [user("hi")] and not left_out


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.JSON"])
def test_other_spellings_of_the_formats(tmp_path, name):
    text = '[{"prompt": "hi"}]' if name == "a.JSON" else '{"prompt": "hi"}'
    (tmp_path / name).write_text(f"\ufeff{text}\r\n", encoding="utf-8")
    assert [c.messages for c in read_conversations(tmp_path / name)] == [user("hi")]


def test_empty_rows_are_left_out_and_counted(tmp_path):
    rows = [
        *({"prompt": empty} for empty in ("", " ", None, [])),
        {"messages": None, "question": "why?"},
        {"messages": [], "prompt": "how?"},
        {"turns": ["", "second"]},
    ]
    left_out = LeftOut()
    asked = read_conversations(write(tmp_path / "a.jsonl", *rows), left_out=left_out)
    assert [c.messages for c in asked] == [user("why?"), user("how?")]
    assert left_out == {"rows in which 'prompt' is empty": 4, "rows in which 'turns' is empty": 1}
    assert str(left_out) == "rows in which 'prompt' is empty (4), rows in which 'turns' is empty (1)"


def test_what_was_left_out_is_one_line_however_many_kinds_there_are(tmp_path):
    turns = [{"role": f"speaker {i % 20}\n", "content": "x"} for i in range(30)]
    left_out = LeftOut()
    path = write(tmp_path / "a.jsonl", {"messages": [*turns, {"role": "user", "content": "x"}]})
    read_conversations(path, left_out=left_out)
    assert "\n" not in str(left_out) and str(left_out).endswith(", other kinds (14)")


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
        (b'{"prompt": " "}\n', r"a.jsonl: holds no prompt, but rows in which 'prompt' is empty \(1\)"),
        (b'{"prompt": 3}\n', "a.jsonl:1: 'prompt' is neither text nor a list of turns"),
        (
            b'{"messages": [{"role": "robot", "content": "x"}]}\n',
            r"a.jsonl: holds no prompt, but turns of role 'robot' \(1\), conversations in which no user speaks \(1\)",
        ),
        (b'{"messages": [{"role": "user", "content": null}]}\n', "a.jsonl: holds no prompt, but turns without text"),
        (b'{"messages": []}\n', "a.jsonl: holds no prompt"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}\n', r"holds no prompt, but turns of role \['user'\]"),
        (b'{"prompt": [[[[]]]]}', "a.jsonl: holds no prompt, but turns that are no JSON objects"),
        (b'{"two\\nlines": 1}\n', r"the row has \['two\\nlines'\]"),
        (b'{"instruction": "x", "input": ["y"]}\n', r"a.jsonl:1: 'input' is not text: \['y'\]"),
        (b"[" * 100_000, "a.jsonl:1: JSON that cannot be read: maximum recursion depth exceeded"),
        (b'{"prompt": "x", "id": ' + b"1" * 5000 + b"}", "a.jsonl:1: JSON that cannot be read: .* 5000 digits"),
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
    path = write(tmp_path / "a.jsonl", {"prompt": "x"})
    with pytest.raises(DataError, match="a.jsonl:1: the key 'problem' is expected; the row has \\['prompt'\\]"):
        read_conversations(path, field="problem")
    with pytest.raises(DataError, match="limit is 0"):
        read_conversations(path, limit=0)
    binary = tmp_path / "image.txt"
    binary.write_bytes(b"fine\nfine\n\xff\xfe")
    with pytest.raises(DataError, match="image.txt: line 3: not UTF-8"):
        read_conversations(binary)
