"""The parts of examples/smollm2/prompts.py that decide what the shipped drafter is trained on."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2" / "prompts.py"


@pytest.fixture(scope="module")
def script():
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
    assert list(script.sharegpt_turns(path)) == ["make it_so please", alone]


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
