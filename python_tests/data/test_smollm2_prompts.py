"""The parts of examples/smollm2/prompts.py that decide what the shipped drafter is trained on."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2" / "prompts.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("smollm2_prompts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_documented_function_becomes_a_completion_prompt(script, tmp_path):
    (tmp_path / "shapes.py").write_text('''
def area(sides: Sequence[int], unit="cm") -> int:
    """Area of a rectangle from its two sides.

    Parameters
    ----------
    sides : two integers

    Examples
    --------
    >>> area([2, 3])
    6
    >>> other(1)
    2
    """
    return sides[0] * sides[1]

def _private(): "Nothing to see, however long this docstring may be."
def terse(): "Short."
''')
    (prompt,) = script.documented_functions(tmp_path)
    assert prompt == (
        "from typing import Sequence\n\n\n"
        "def area(sides: Sequence[int], unit='cm') -> int:\n"
        '    """Area of a rectangle from its two sides.\n'
        "    >>> area([2, 3])\n"
        "    6\n"
        '    """\n'
    )


def test_human_turns_that_stand_alone(script, tmp_path):
    def conversation(identity, *turns):
        speakers = ["human", "gpt"] * len(turns)
        said = [{"from": who, "value": what} for who, what in zip(speakers, turns, strict=False)]
        return {"id": identity, "conversations": said}

    alone = "Write a poem about the sea for my daughter"
    rows = [
        conversation("a_0", "make it\\_so please", "done", "now shorter", "done", alone),
        conversation("b_3", "what is the rest", "that", "explain the second point of your answer in detail"),
        conversation("c_0", "Qu'est-ce que c'est, mon ami de toujours?"),
        conversation("d_0", "never reached, the file is cut off in it"),
    ]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows)[:-20])
    assert list(script.sharegpt_turns(script.truncated_json_array(path))) == ["make it_so please", alone]


def test_near_copies_of_evaluation_prompts_are_found(script, tmp_path):
    question = "A train leaves at noon with twelve passengers and picks up seven more at each of three stops."
    path = tmp_path / "evaluation.jsonl"
    rows = [{"question": question}, {"turns": ["Write a haiku."]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = script.EvaluationSets([path])
    assert evaluation.has_near(question.upper())
    assert evaluation.has_near("You are a teacher. Solve this: " + question + " Explain every step.")
    assert evaluation.has_near("write a haiku")
    assert not evaluation.has_near("A train leaves at noon with twelve wagons; how many wheels does it have?")


def sentence(number):
    return f"The number {number} is what this sentence of the passage is about, and it says so to the reader. "


@pytest.fixture
def conversations():
    """Each with one answer of prose, and a list behind it."""
    question = "What is the number {} about, and why do people like it so much?"
    answer = "".join(sentence(f"{{0}}-{number}") for number in range(12)) + "\n\n- a list\n- of points"
    return [
        {
            "id": f"{i}_0",
            "conversations": [
                {"from": "human", "value": question.format(i)},
                {"from": "gpt", "value": answer.format(i)},
            ],
        }
        for i in range(40)
    ]


def test_passages_are_whole_sentences_without_lists(script, conversations):
    found = list(script.kinds.passages(conversations))
    assert len(found) == 80  # two of each answer
    assert all(250 <= len(text) <= 700 and text.endswith("reader.") and "- a" not in text for _, text in found)
    assert [bool(request) for request, _ in found] == [True, False] * 40  # the second piece answers nothing alone


def test_the_kinds_share_no_passage(script, conversations, tmp_path, monkeypatch):
    """Sayings keep their languages, and none that may offend is used."""
    files = {
        "de/zitate": "Wer nicht wagt, der nicht gewinnt.\n\t\t-- Volksmund\n%\n",
        "es/off/x": "No se debe usar nunca.\n%\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(script.kinds, "mathematics", lambda draw, count: iter(["What is 2 + 2?"]))
    monkeypatch.setattr(script.kinds, "country_questions", lambda draw: iter(["What is the capital of Chad?"]))
    arguments = type("Arguments", (), {"seed": 0, "per_kind": 9, "fortunes": tmp_path, "wordnet": None})
    made = {kind: list(texts) for kind, texts in script.of_kinds(arguments, conversations)}
    assert made.keys() == {"translation", "summaries", "retrieval", "facts", "mathematics"}
    german = [text for text in made["translation"] if "gewinnt" in text]
    assert len(german) == 1 and "English" in german[0] and "Volksmund" not in german[0]
    assert not any("nunca" in text for text in made["translation"])
    seen = {}
    for kind in ("translation", "summaries"):
        for text in made[kind]:
            for number in set(re.findall(r"number (\d+-\d+)", text)):
                assert seen.setdefault(number, text) == text
    assert len(seen) > 20
    assert all("What is the number" in text and "[1]" in text for text in made["retrieval"])
    assert made["facts"] == ["What is the capital of Chad?"]
