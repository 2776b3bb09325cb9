"""The target's answers as training sequences."""

from __future__ import annotations

import copy
import hashlib
from array import array
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .answer_file import whole_lines
from .errors import DataError
from .parsing import require_file


class AnswerDataset(Dataset):
    """Prompts and answers as training sequences: `{"input_ids": int64 [S], "loss_mask": bool [S]}`.

    The mask is True on the answer's tokens.

    Args:
        path: a file that `answer_prompts` wrote. Its last line may have been cut off.
        max_length: sequences are cut to this number of tokens.
        vocab_size: the vocabulary size of the target to train for. Answers with another vocabulary are refused.
        min_response: answers that have fewer tokens than this after the cut are left out.

    Attributes:
        dropped: the number of answers that were left out.

    Raises:
        DataError: the file is missing, is of another kind, has a broken line or a token outside the vocabulary,
            or holds no answer that is long enough.
    """

    def __init__(self, path: str | Path, max_length: int, *, vocab_size: int | None = None, min_response: int = 4):
        path = Path(path)
        require_file(path)
        lines = whole_lines(path)
        _, header = next(lines, (0, None))
        if header is None:
            raise DataError(f"{path}: not a file of answers: it has no complete line")
        if vocab_size not in (None, header["vocab_size"]):
            raise DataError(
                f"{path}: the answers are of a target with a vocabulary of {header['vocab_size']}; "
                f"this one has {vocab_size}"
            )
        # One flat array instead of a list for each row: a list of Python ints takes ten times the memory.
        tokens, ends, prompt_lengths, prompt_keys = array("i"), array("q", [0]), array("q"), array("q")
        self.dropped = 0
        for _, row in lines:
            prompt = row["prompt_ids"]
            sequence = (prompt + row["response_ids"])[:max_length]
            if len(sequence) - len(prompt) < min_response:
                self.dropped += 1
                continue
            tokens.extend(sequence)
            ends.append(len(tokens))
            prompt_lengths.append(len(prompt))
            digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=8).digest()
            prompt_keys.append(int.from_bytes(digest, "little", signed=True))
        if not prompt_lengths:
            raise DataError(f"{path}: no answer has {min_response} tokens or more within {max_length} tokens")
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)
        self._prompt_lengths = torch.frombuffer(prompt_lengths, dtype=torch.int64)
        self._prompt_keys = torch.frombuffer(prompt_keys, dtype=torch.int64)
        self._rows = torch.arange(len(prompt_lengths))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index]
        input_ids = self._tokens[self._ends[row] : self._ends[row + 1]].long()
        loss_mask = torch.arange(len(input_ids)) >= self._prompt_lengths[row]
        return {"input_ids": input_ids, "loss_mask": loss_mask}

    def split(self, fraction: float, seed: int = 0) -> tuple[AnswerDataset, AnswerDataset]:
        """Splits off a share of the prompts with all their answers: the rest, then that share.

        The choice depends on the prompts and the seed, not on the order of the answers. At least one prompt
        is held out unless `fraction` is 0 or there is only one prompt.
        """
        keys = self._prompt_keys[self._rows]
        prompts = keys.unique()
        count = min(len(prompts) - 1, max(1, round(fraction * len(prompts)))) if fraction else 0
        chosen = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:count]
        held_out = torch.isin(keys, prompts[chosen])
        return self._only(~held_out), self._only(held_out)

    def _only(self, rows: Tensor) -> AnswerDataset:
        part = copy.copy(self)
        part._rows = self._rows[rows]
        return part
