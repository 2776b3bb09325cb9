"""Text files as rows of tokens of one length, in which documents keep their boundaries."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .dataset import AnswerDataset
from .errors import DataError
from .parsing import excerpt, json_value, require_file, utf8_text

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
AT_A_TIME = 256  # documents that the tokenizer encodes at a time


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The documents of text files: the rows of a JSONL file, or one for any other file.

    Args:
        paths: files, or folders of which all files are read, in the order of their names. A file that ends in .gz, .xz
            or .bz2 is decompressed. A row of a JSONL file is a string, or an object whose `text` is one.

    Raises:
        DataError: a file is missing or not UTF-8, or a row is neither.
    """
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            require_file(file)
            try:
                with OPENERS.get(file.suffix, open)(file, "rb") as opened:
                    content = opened.read()
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise DataError(f"{file}: cannot be read: {error}") from None
            text = utf8_text(content, str(file))
            is_jsonl = ".jsonl" in file.suffixes[-2:]
            yield from _rows(text, file) if is_jsonl else [text] if text.strip() else []


def _rows(text: str, file: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = json_value(line, where)
        found = row.get("text") if isinstance(row, dict) else row
        if not isinstance(found, str):
            raise DataError(f"{where}: a string, or an object with a string 'text', is expected: {excerpt(row)}")
        if found.strip():
            yield found


class TextDataset(Dataset):
    """Documents behind each other in rows of `length` tokens: {"input_ids": int64 [length], "starts": int64 [n]}.

    `starts` has the column at which each document of a row starts, so that no mask, position or loss crosses from one
    document into the next. A document that goes on in the next row is a document of its own there. The rest that does
    not fill a row is left out. Each document ends with the tokenizer's end token. One that starts with the begin token
    does so in every row that it goes on in: models that were trained with this token are lost without it (Gemma).

    Samples of answers also have "prefixes": int64 [n], the tokens of each document that belong to the prompt.

    Args:
        texts: documents, as from `read_texts`.
        source: where they are from, for messages.

    Attributes:
        length: the tokens of a row.
        documents: the number of documents.
        source: as it was given.

    Raises:
        DataError: the documents have fewer tokens than a row.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, *, source: object = "the text"
    ):
        tokens, starts = array("i"), array("q")
        begin = tokenizer.bos_token_id
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = iter(texts)
        while some := list(islice(texts, AT_A_TIME)):
            for ids in tokenizer(some, verbose=False)["input_ids"]:
                if ids[-1:] != end:
                    ids = ids + end
                if ids:
                    starts.append(len(tokens))
                    tokens.extend(_begun_in_each_row(ids, begin, len(tokens), length))
        self.source = source
        self._fill(tokens, starts, length)

    @classmethod
    def of_files(cls, paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int) -> TextDataset:
        """Rows of the documents of files, which `read_texts` reads."""
        return cls(read_texts(paths), tokenizer, length, source=", ".join(str(path) for path in paths))

    @classmethod
    def of_answers(cls, answers: AnswerDataset, length: int, begin: int | None = None) -> TextDataset:
        """Rows of prompts with their answers, each of which is a document.

        Args:
            begin: the tokenizer's begin token.
        """
        tokens, starts, ends = array("i"), array("q"), array("q")
        for index in range(len(answers)):
            sample = answers[index]
            ids, prompt = sample["input_ids"].tolist(), int((~sample["loss_mask"]).sum())
            starts.append(len(tokens))
            ends.append(len(tokens) + len(_begun_in_each_row(ids[:prompt], begin, len(tokens), length)))
            tokens.extend(_begun_in_each_row(ids, begin, len(tokens), length))
        made = object.__new__(cls)
        made.source = answers.path
        made._fill(tokens, starts, length, torch.frombuffer(ends, dtype=torch.int64))
        return made

    def _fill(self, tokens: array, starts: array, length: int, prompt_ends: Tensor | None = None) -> None:
        self.length = length
        self.documents = len(starts)
        if len(tokens) < length:
            raise DataError(f"{self.source} has {len(tokens)} tokens: at least a row of {length} is needed")
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self._starts = torch.frombuffer(starts, dtype=torch.int64)
        self._prompt_ends = prompt_ends
        self._rows = torch.arange(len(tokens) // length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = int(self._rows[index]) * self.length
        input_ids = self._tokens[first : first + self.length].long()
        low, high = torch.searchsorted(self._starts, torch.tensor([first + 1, first + self.length])).tolist()
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self._starts[low:high] - first])
        sample = {"input_ids": input_ids, "starts": starts}
        if self._prompt_ends is not None:
            sample["prefixes"] = (self._prompt_ends[low - 1 : high] - first - starts).clamp(min=0)
        return sample

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each row: int64 [len(self)]."""
        return torch.full((len(self),), self.length)

    @property
    def longest(self) -> int:
        """The tokens of the longest document. One that goes on in another row is a document of its own there."""
        edges = torch.cat([self._starts, torch.arange(len(self._tokens) // self.length + 1) * self.length]).unique()
        lengths, rows = edges.diff(), edges[:-1] // self.length
        return int(lengths[torch.isin(rows, self._rows)].max())

    def count(self, token: int) -> int:
        """How often the text has a token."""
        return int((self._tokens == token).sum())

    def fingerprint(self) -> str:
        """A hash of all tokens and of where documents start."""
        digest = hashlib.sha256(self._starts.numpy().tobytes())
        digest.update(self._tokens.numpy().tobytes())
        if self._prompt_ends is not None:
            digest.update(self._prompt_ends.numpy().tobytes())
        return digest.hexdigest()[:16]

    def first(self, rows: int) -> TextDataset:
        """The first rows alone, or all if there are fewer."""
        part = object.__new__(TextDataset)
        part.__dict__ = self.__dict__ | {"_rows": self._rows[:rows]}
        return part


def _begun_in_each_row(ids: list[int], begin: int | None, at: int, length: int) -> list[int]:
    """A document whose first token stands at `at`, with the begin token in each row of `length` tokens, if it has one.

    Where a document goes on in another row, the token is put before the row's others.
    """
    if not ids or ids[0] != begin:
        return ids
    first = length - at % length  # the tokens of the row in which the document starts
    found = ids[:first]
    for start in range(first, len(ids), length - 1):
        found += [begin, *ids[start : start + length - 1]]
    return found
