import json

import pytest
import torch

from dflash_ext.data import DataError, ResponseDataset


def write(path, *answers, cut=0):
    """Answers are (prompt, response) pairs of token ids; `cut` bytes are missing at the end."""
    lines = ['{"format": "dflash_ext.responses"}']
    for index, (prompt, response) in enumerate(answers):
        row = {"index": index, "temperature": 0.0, "prompt_ids": prompt, "response_ids": response}
        lines.append(json.dumps(row))
    text = "\n".join(lines) + "\n"
    path.write_text(text[: len(text) - cut])
    return path


def test_sequences_and_masks(tmp_path):
    path = write(
        tmp_path / "a.jsonl", ([5, 6], [7, 8, 9, 10]), ([1], [2, 3]), ([4] * 3, [2] * 9), ([4] * 9, [2] * 9)
    )
    dataset = ResponseDataset(path, max_length=8)
    assert (len(dataset), dataset.dropped) == (2, 2)
    assert dataset[0]["input_ids"].tolist() == [5, 6, 7, 8, 9, 10]
    assert dataset[0]["loss_mask"].tolist() == [False] * 2 + [True] * 4
    assert dataset[1]["input_ids"].tolist() == [4] * 3 + [2] * 5
    assert dataset[1]["loss_mask"].tolist() == [False] * 3 + [True] * 5
    assert (dataset[0]["input_ids"].dtype, dataset[0]["loss_mask"].dtype) == (torch.int64, torch.bool)


def test_a_file_that_was_cut_off_gives_its_whole_rows(tmp_path):
    answers = [([i], [7, 8, 9, 10]) for i in range(3)]
    assert len(ResponseDataset(write(tmp_path / "a.jsonl", *answers, cut=1), 100)) == 2


def test_split_keeps_a_prompt_on_one_side(tmp_path):
    answers = [([prompt, prompt], [sample] * 5) for sample in range(3) for prompt in range(20)]
    forward = ResponseDataset(write(tmp_path / "a.jsonl", *answers), 100)
    train, held_out = forward.split(0.2, seed=1)

    def prompts(part):
        return {int(part[i]["input_ids"][0]) for i in range(len(part))}

    assert (len(train), len(held_out)) == (48, 12)
    assert len(prompts(held_out)) == 4 and not prompts(train) & prompts(held_out)
    backward = ResponseDataset(write(tmp_path / "b.jsonl", *reversed(answers)), 100)
    assert prompts(backward.split(0.2, seed=1)[1]) == prompts(held_out)
    assert prompts(forward.split(0.2, seed=2)[1]) != prompts(held_out)


def test_split_sizes_at_the_edges(tmp_path):
    several = ResponseDataset(write(tmp_path / "a.jsonl", *[([i], [1] * 4) for i in range(5)]), 100)
    assert [len(part) for part in several.split(0.0)] == [5, 0]
    assert [len(part) for part in several.split(0.01)] == [4, 1]
    alone = ResponseDataset(write(tmp_path / "b.jsonl", ([1], [1] * 4)), 100)
    assert [len(part) for part in alone.split(0.5)] == [1, 0]


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(DataError, match="a.jsonl: no such file"):
        ResponseDataset(tmp_path / "a.jsonl", 100)
    with pytest.raises(DataError, match="a.jsonl: holds no answer with 4 tokens or more within 100"):
        ResponseDataset(write(tmp_path / "a.jsonl", ([1], [2])), 100)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="prompts.jsonl: not a file of answers"):
        ResponseDataset(prompts, 100)
    broken = write(tmp_path / "b.jsonl", ([1], [2] * 4))
    broken.write_text(broken.read_text() + "{}\n")
    with pytest.raises(DataError, match="b.jsonl:3: a row with index, "):
        ResponseDataset(broken, 100)
