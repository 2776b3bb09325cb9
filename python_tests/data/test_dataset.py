import json

import pytest
import torch

from dflash_ext.data import AnswerDataset, DataError, answer_prompts
from dflash_ext.models import Target
from python_tests.tiny import tiny_model


def write(path, *answers, cut=0):
    """Answers are (prompt, response) pairs of token ids; `cut` bytes are missing at the end."""
    lines = ['{"format": "dflash_ext.responses", "vocab_size": 97}']
    for index, (prompt, response) in enumerate(answers):
        row = {"index": index, "temperature": 0.0, "prompt_ids": prompt, "response_ids": response}
        lines.append(json.dumps(row))
    text = "\n".join(lines) + "\n"
    path.write_text(text[: len(text) - cut])
    return path


def test_sequences_and_masks(tmp_path):
    path = write(tmp_path / "a.jsonl", ([5, 6], [7, 8, 9, 10]), ([1], [2, 3]), ([4] * 3, [2] * 9), ([4] * 9, [2] * 9))
    dataset = AnswerDataset(path, max_length=8)
    assert (len(dataset), dataset.dropped) == (2, 2)
    assert dataset[0]["input_ids"].tolist() == [5, 6, 7, 8, 9, 10]
    assert dataset[0]["loss_mask"].tolist() == [False] * 2 + [True] * 4
    assert dataset[1]["input_ids"].tolist() == [4] * 3 + [2] * 5
    assert dataset[1]["loss_mask"].tolist() == [False] * 3 + [True] * 5
    assert (dataset[0]["input_ids"].dtype, dataset[0]["loss_mask"].dtype) == (torch.int64, torch.bool)


def test_a_file_that_was_cut_off_gives_its_whole_rows(tmp_path):
    answers = [([i], [7, 8, 9, 10]) for i in range(3)]
    assert len(AnswerDataset(write(tmp_path / "a.jsonl", *answers, cut=1), 100)) == 2


def test_split_keeps_a_prompt_on_one_side(tmp_path):
    answers = [([prompt, prompt], [sample] * 5) for sample in range(3) for prompt in range(20)]
    forward = AnswerDataset(write(tmp_path / "a.jsonl", *answers), 100)
    train, held_out = forward.split(0.2, seed=1)

    def prompts(part):
        return {int(part[i]["input_ids"][0]) for i in range(len(part))}

    assert (len(train), len(held_out)) == (48, 12)
    assert len(prompts(held_out)) == 4 and not prompts(train) & prompts(held_out)
    backward = AnswerDataset(write(tmp_path / "b.jsonl", *reversed(answers)), 100)
    assert prompts(backward.split(0.2, seed=1)[1]) == prompts(held_out)
    assert prompts(forward.split(0.2, seed=2)[1]) != prompts(held_out)


def test_split_sizes_at_the_edges(tmp_path):
    several = AnswerDataset(write(tmp_path / "a.jsonl", *[([i], [1] * 4) for i in range(5)]), 100)
    assert [len(part) for part in several.split(0.0)] == [5, 0]
    assert [len(part) for part in several.split(0.01)] == [4, 1]
    alone = AnswerDataset(write(tmp_path / "b.jsonl", ([1], [1] * 4)), 100)
    assert [len(part) for part in alone.split(0.5)] == [1, 0]


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    with pytest.raises(DataError, match="a.jsonl: no such file"):
        AnswerDataset(tmp_path / "a.jsonl", 100)
    with pytest.raises(DataError, match="a file is expected, this is a folder"):
        AnswerDataset(tmp_path, 100)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="empty.jsonl: not a file of answers: it has no complete line"):
        AnswerDataset(tmp_path / "empty.jsonl", 100)
    with pytest.raises(DataError, match="a.jsonl: there is no answer in it"):
        AnswerDataset(write(tmp_path / "a.jsonl"), 100)
    path = write(tmp_path / "a.jsonl", ([1], [2]))
    with pytest.raises(DataError, match="a.jsonl: no answer has 4 tokens or more within 100 tokens"):
        AnswerDataset(path, 100)
    with pytest.raises(
        DataError, match="a.jsonl: the answers are of a target with a vocabulary of 97; this one has 98"
    ):
        AnswerDataset(path, 100, target=Target(tiny_model("llama", vocab_size=98)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="prompts.jsonl: not a file of answers"):
        AnswerDataset(prompts, 100)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{}", "a row with index, prompt_ids, response_ids, temperature is expected, this is {}"),
        (b"[1]", "a row with index, .* is expected, this is .1."),
        (b"\xff", "not UTF-8 .byte 0xff."),
        (b"", "not valid JSON"),
        (dict(index=[1]), "index .1. and temperature 0.0 should be numbers"),
        (dict(temperature="0"), "index 0 and temperature '0' should be numbers"),
        (dict(prompt_ids="abc"), "'prompt_ids' is not a list of tokens: 'abc'"),
        (dict(prompt_ids=None), "'prompt_ids' is not a list of tokens: None"),
        (dict(prompt_ids=[[5]]), "'prompt_ids' has .5., which is no token"),
        (dict(prompt_ids=[True]), "'prompt_ids' has True, which is no token"),
        (dict(response_ids=[5, 6.0]), "'response_ids' has 6.0, which is no token"),
        (dict(response_ids=[-1]), "'response_ids' has -1, which is no token"),
        (dict(response_ids=[96, 97]), "'response_ids' has 97, which is no token of a vocabulary of 97"),
        (dict(response_ids=[10**30]), "'response_ids' has 10+, which is no token"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_a_row_is_said_in_one_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", ([1], [2] * 4))
    if isinstance(line, dict):
        line = json.dumps({"index": 0, "temperature": 0.0, "prompt_ids": [5], "response_ids": [6]} | line).encode()
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=f"a.jsonl:3: {message}") as error:
        AnswerDataset(path, 100)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_split_keeps_a_conversation_on_one_side(tmp_path):
    """Its turns are different prompts. Conversations with a prompt in common stay together, too."""
    lines = ['{"format": "dflash_ext.responses", "vocab_size": 97}']
    for conversation in range(20):
        first = [50] if conversation in (3, 4) else [conversation]  # two conversations that begin alike
        for index, prompt in enumerate((first, [*first, 60, conversation], [*first, 60, 61, conversation])):
            row = {"index": 3 * conversation + index, "temperature": 0.0, "conversation": conversation}
            lines.append(json.dumps(row | {"prompt_ids": prompt, "response_ids": [1] * 4}))

    def sides(lines, seed):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(lines) + "\n")
        parts = AnswerDataset(path, 100).split(0.2, seed)
        return [{int(part[i]["input_ids"][0]) for i in range(len(part))} for part in parts]

    chosen = set()
    for seed in range(8):
        trained, held_out = sides(lines, seed)
        assert len(held_out) == 4 and not trained & held_out
        assert sides([lines[0], *reversed(lines[1:])], seed) == [trained, held_out]
        chosen |= held_out
    assert len(chosen) > 8


def test_what_is_known_of_the_sequences(tmp_path):
    path = write(tmp_path / "a.jsonl", ([5, 6], [7] * 4), ([1], [2] * 9), ([5, 6], [8] * 5))
    dataset = AnswerDataset(path, max_length=8)
    assert dataset.lengths.tolist() == [6, 8, 7]
    assert [dataset[i]["cut"] for i in range(3)] == [False, True, False]
    assert sorted(dataset.prompts()) == [[1], [5, 6]]
    _, held_out = dataset.split(0.5)
    assert held_out.lengths.tolist() == [len(held_out[i]["input_ids"]) for i in range(len(held_out))]
    assert len(held_out.prompts()) == 1


def test_answers_of_another_target_are_refused(tmp_path):
    """Its vocabulary is as large, its weights differ."""
    target = Target(tiny_model("llama"))
    path = tmp_path / "a.jsonl"
    answer_prompts(target, {0: [5, 6]}, path, max_new_tokens=8)
    assert len(AnswerDataset(path, 100, target=target)) == 1
    other = Target(tiny_model("llama", initializer_range=0.1))
    with pytest.raises(DataError, match="a.jsonl: the answers are of another target, .*: its weights differ"):
        AnswerDataset(path, 100, target=other)
