import gzip
import json
import lzma

import pytest
import torch

from dflash_ext.data import AnswerDataset, DataError, NoiseCollator, TextDataset, check_blocks, read_texts
from dflash_ext.noise import MaskNoise, Share
from python_tests.data.words import word_tokenizer

END = 2  # the end token of word_tokenizer


def words(*tokens):
    return " ".join(f"w{token:03}" for token in tokens)


def test_documents_are_packed_with_their_boundaries():
    documents = [words(*range(3, 8)), words(10), words(*range(20, 30))]
    dataset = TextDataset(documents, word_tokenizer(), 6)
    assert len(dataset) == 3 and dataset.documents == 3 and dataset.lengths.tolist() == [6, 6, 6]
    rows = [dataset[row] for row in range(3)]
    assert [row["input_ids"].tolist() for row in rows] == [
        [3, 4, 5, 6, 7, END],
        [10, END, 20, 21, 22, 23],
        [24, 25, 26, 27, 28, 29],  # the end token of the last document fills no row
    ]
    # A document that goes on in the next row is a document of its own there.
    assert [row["starts"].tolist() for row in rows] == [[0], [0, 2], [0]]


def test_a_document_has_its_begin_token_in_every_row():
    """Gemma's likelihoods are far worse without it: 4.3 nats a token against 2.8 on parts of five documents."""
    documents = [words(*range(3, 8)), words(*range(20, 36)), words(50)]
    dataset = TextDataset(documents, word_tokenizer(bos="w001"), 8)
    assert [dataset[row]["input_ids"].tolist() for row in range(len(dataset))] == [
        [1, 3, 4, 5, 6, 7, END, 1],
        [1, 20, 21, 22, 23, 24, 25, 26],
        [1, 27, 28, 29, 30, 31, 32, 33],
    ]  # the last document fills no row
    assert [dataset[row]["starts"].tolist() for row in range(len(dataset))] == [[0, 7], [0], [0]]


def test_every_row_and_boundary_of_many_documents():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (300,), generator=generator).tolist()
    dataset = TextDataset([words(*([5] * length)) for length in lengths], word_tokenizer(), 64)
    ids = torch.cat([dataset[row]["input_ids"] for row in range(len(dataset))])
    starts = torch.cat([dataset[row]["starts"] + 64 * row for row in range(len(dataset))])
    behind_ends = (ids == END).nonzero().flatten() + 1
    want = torch.cat([behind_ends[behind_ends < len(ids)], torch.arange(0, len(ids), 64)]).unique()
    assert torch.equal(starts, want) and len(dataset) == (sum(lengths) + 300) // 64


def test_prompts_of_answers_are_prefixes(tmp_path):
    """Also in the next row, into which a document goes on, and no token of a prompt is hidden."""
    rows = ['{"format": "dflash_ext.responses", "vocab_size": 97}']
    for index, (prompt, answer) in enumerate([(3, 6), (12, 4), (2, 9)]):
        ids = {"prompt_ids": [10 + index] * prompt, "response_ids": [50 + index] * answer}
        rows.append(json.dumps({"index": index, "temperature": 0.0} | ids))
    (tmp_path / "answers.jsonl").write_text("\n".join(rows) + "\n")
    dataset = TextDataset.of_answers(AnswerDataset(tmp_path / "answers.jsonl", 36), 12)
    assert [dataset[i]["starts"].tolist() for i in range(3)] == [[0, 9], [0], [0, 1]]
    assert [dataset[i]["prefixes"].tolist() for i in range(3)] == [[3, 12], [9], [0, 2]]
    batch = NoiseCollator(MaskNoise(Share(1.0, 1.0)))([dataset[i] | {"key": (0, 0, i)} for i in range(3)])
    is_answer = batch["input_ids"] >= 50
    is_answer[2, 0] = False  # the last token of an answer, alone in its row, is too short to be denoised
    assert torch.equal(batch["hidden"], is_answer)


def test_answers_have_their_begin_token_in_every_row(tmp_path):
    """It belongs to the prefix, also in a row in which no token of the prompt stands."""
    rows = ['{"format": "dflash_ext.responses", "vocab_size": 97}']
    ids = {"prompt_ids": [1] + [10] * 4, "response_ids": [50] * 20}
    rows.append(json.dumps({"index": 0, "temperature": 0.0} | ids))
    (tmp_path / "answers.jsonl").write_text("\n".join(rows) + "\n")
    answers = AnswerDataset(tmp_path / "answers.jsonl", 36)
    dataset = TextDataset.of_answers(answers, 9, begin=1)
    assert [dataset[i]["input_ids"].tolist() for i in range(3)] == [[1, *[10] * 4, *[50] * 4], *[[1, *[50] * 8]] * 2]
    assert [dataset[i]["prefixes"].tolist() for i in range(3)] == [[5], [0], [0]]
    hidden = NoiseCollator(MaskNoise(Share(1.0, 1.0)))([dataset[i] | {"key": (0, 0, i)} for i in range(3)])["hidden"]
    assert hidden.tolist() == [[False] * 5 + [True] * 4] + [[False] + [True] * 8] * 2
    crossing = TextDataset.of_answers(answers, 4, begin=1)
    assert crossing[1]["input_ids"].tolist() == [1, 10, 50, 50] and crossing[1]["prefixes"].tolist() == [2]


def test_the_first_rows_alone():
    dataset = TextDataset([words(*[7] * 50)], word_tokenizer(), 10)
    part = dataset.first(2)
    assert len(part) == 2 and len(dataset) == 5 and torch.equal(part[1]["input_ids"], dataset[1]["input_ids"])
    assert part.fingerprint() == dataset.fingerprint()


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntext")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n\n" + json.dumps("three") + "\n")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("four")
    with lzma.open(tmp_path / "d.jsonl.xz", "wt") as file:
        file.write('{"text": "five"}\n{"text": "  "}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    assert list(read_texts([tmp_path])) == ["one\ntext", "two", "three", "four", "five"]
    assert list(read_texts([tmp_path / "d.jsonl.xz", tmp_path / "a.txt"])) == ["five", "one\ntext"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl, line 2: a string, or an object with"),
        ("a.jsonl", b"{", r"a\.jsonl, line 1: not valid JSON"),
        ("a.txt", b"\xff\xfe\xfa", r"a\.txt: not UTF-8"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: cannot be read"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz: cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts([tmp_path / name]))


def test_no_file_and_too_little_text(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_texts([tmp_path / "a.txt"]))
    with pytest.raises(DataError, match="the text has 3 tokens: at least a row of 4 is needed"):
        TextDataset([words(3, 4)], word_tokenizer(), 4)
    (tmp_path / "short.txt").write_text(words(3, 4))
    with pytest.raises(DataError, match="short.txt has 3 tokens"):
        TextDataset.of_files([tmp_path / "short.txt"], word_tokenizer(), 4)
    header, ids = {"format": "dflash_ext.responses", "vocab_size": 97}, {"prompt_ids": [5], "response_ids": [6] * 9}
    (tmp_path / "answers.jsonl").write_text(
        f"{json.dumps(header)}\n{json.dumps({'index': 0, 'temperature': 0.0} | ids)}\n"
    )
    with pytest.raises(DataError, match="answers.jsonl has 10 tokens"):
        TextDataset.of_answers(AnswerDataset(tmp_path / "answers.jsonl", 64), 64)


def test_a_text_without_a_document_to_denoise():
    lengths = (2, 7, 1, 3)  # with the end tokens, in rows of 6: 3 and 3, 5 and 1, 1 and 4
    dataset = TextDataset([words(*[5] * length) for length in lengths], word_tokenizer(), 6)
    assert [len(dataset[row]["starts"]) for row in range(len(dataset))] == [2, 2]
    assert dataset.longest == 5 and dataset.first(1).longest == 3
    check_blocks(dataset)
    with pytest.raises(DataError, match="the text: there is nothing to denoise, since no document has 4 tokens"):
        check_blocks(dataset.first(1))
