"""The target's answers as training sequences."""

from __future__ import annotations

import copy
import hashlib
from array import array
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models import Target
from .answer_file import check_target, whole_lines
from .errors import DataError
from .parsing import require_file


class AnswerDataset(Dataset):
    """Prompts and answers as training sequences: {"input_ids": int64 [S], "loss_mask": bool [S], "cut": bool}.

    The mask is True on the answer's tokens. "cut" is True if the answer goes on beyond the end of the sequence.

    Args:
        path: a file that `answer_prompts` wrote. Its last line may have been cut off.
        max_length: sequences are cut to this number of tokens.
        target: the target to train for. Answers of another one are refused.
        min_response: answers that have fewer tokens than this after the cut are left out.

    Attributes:
        path: the file.
        header: the first line of the file.
        dropped: the number of answers that were left out because they are too short.
        no_round_trip: the number of a server's answers that were left out because their text does not stand for the
            same tokens.

    Raises:
        DataError: the file is missing, is of another kind, has a broken line or a token outside the vocabulary,
            or holds no answer that is long enough.
    """

    def __init__(self, path: str | Path, max_length: int, *, target: Target | None = None, min_response: int = 4):
        path = Path(path)
        require_file(path)
        lines = whole_lines(path)
        _, header = next(lines, (0, None))
        if header is None:
            raise DataError(f"{path}: not a file of answers: it has no complete line")
        if target is not None:
            check_target(path, header, target)
        self.path, self.header = path, header
        # One flat array instead of a list for each row: a list of Python ints takes ten times the memory.
        tokens, ends, prompt_lengths, is_cut = array("i"), array("q", [0]), array("q"), array("b")
        prompt_keys, conversations = array("q"), array("q")
        self.dropped = self.no_round_trip = 0
        for _, row in lines:
            if "no_round_trip" in row:
                self.no_round_trip += 1
                continue
            prompt, response = row["prompt_ids"], row["response_ids"]
            sequence = (prompt + response)[:max_length]
            if len(sequence) - len(prompt) < min_response:
                self.dropped += 1
                continue
            tokens.extend(sequence)
            ends.append(len(tokens))
            prompt_lengths.append(len(prompt))
            is_cut.append(len(sequence) < len(prompt) + len(response))
            digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=8).digest()
            prompt_keys.append(int.from_bytes(digest, "little", signed=True))
            conversations.append(row.get("conversation", -1 - row["index"]))
        if not prompt_lengths and not self.dropped:
            raise DataError(f"{path}: there is no answer in it")
        if not prompt_lengths:
            raise DataError(f"{path}: no answer has {min_response} tokens or more within {max_length} tokens")
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)
        self._prompt_lengths = torch.frombuffer(prompt_lengths, dtype=torch.int64)
        self._is_cut = torch.frombuffer(is_cut, dtype=torch.int8).bool()
        self._prompt_keys = torch.frombuffer(prompt_keys, dtype=torch.int64)
        self._groups = _groups(self._prompt_keys, torch.frombuffer(conversations, dtype=torch.int64))
        self._rows = torch.arange(len(prompt_lengths))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | bool]:
        row = self._rows[index]
        input_ids = self._tokens[self._ends[row] : self._ends[row + 1]].long()
        loss_mask = torch.arange(len(input_ids)) >= self._prompt_lengths[row]
        return {"input_ids": input_ids, "loss_mask": loss_mask, "cut": bool(self._is_cut[row])}

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each sequence: int64 [len(self)]."""
        return self._ends[self._rows + 1] - self._ends[self._rows]

    @property
    def rows(self) -> Tensor:
        """The number of each sequence in the whole dataset, of which this may be a part: int64 [len(self)]."""
        return self._rows

    def fingerprint(self) -> str:
        """A hash of all sequences of the whole dataset."""
        digest = hashlib.sha256(self._ends.numpy().tobytes())
        digest.update(self._tokens.numpy().tobytes())
        return digest.hexdigest()[:16]

    def prompts(self) -> list[list[int]]:
        """The token ids of the different prompts, in an order that does not depend on that of the answers."""
        first_row = dict(zip(self._prompt_keys[self._rows].tolist(), self._rows.tolist(), strict=True))
        starts = [(int(self._ends[row]), int(self._prompt_lengths[row])) for _, row in sorted(first_row.items())]
        return [self._tokens[start : start + length].tolist() for start, length in starts]

    def split(self, fraction: float, seed: int = 0) -> tuple[AnswerDataset, AnswerDataset]:
        """Splits off a share of the conversations with all answers to their prompts: the rest, then that share.

        Conversations with a prompt in common stay together. The choice depends on the prompts and the seed, not on the
        order of the answers. At least one conversation is held out unless `fraction` is 0 or there is only one.
        """
        of_row = self._groups[self._rows]
        groups = of_row.unique()
        count = min(len(groups) - 1, max(1, round(fraction * len(groups)))) if fraction else 0
        chosen = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[:count]
        held_out = torch.isin(of_row, groups[chosen])
        return self._only(~held_out), self._only(held_out)

    def _only(self, rows: Tensor) -> AnswerDataset:
        part = copy.copy(self)
        part._rows = self._rows[rows]
        return part


def _groups(prompts: Tensor, conversations: Tensor) -> Tensor:
    """The same number for rows of one conversation or of one prompt, over any chain of them: int64 [rows].

    The number is the least key of the prompts of all these rows.
    """
    _, prompts_at = prompts.unique(return_inverse=True)
    _, conversations_at = conversations.unique(return_inverse=True)
    groups = prompts.clone()
    while True:
        before = groups
        for at in (prompts_at, conversations_at):
            least = torch.full((int(at.max()) + 1,), torch.iinfo(torch.int64).max)
            groups = least.scatter_reduce(0, at, groups, "amin")[at]
        if torch.equal(groups, before):
            return groups
