"""The target's context features of answers in safetensors, for training that does not run the target's layers.

A folder of features has `features-00000.safetensors` and so on, and `features.json`, which says of what they are. A
shard has one tensor [S, taps * H] for each answer, named after its number in the dataset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..models import Target
from .dataset import AnswerDataset
from .errors import DataError

FACTS = "features.json"


def write_features(
    target: Target,
    answers: AnswerDataset,
    folder: str | Path,
    *,
    shard_tokens: int = 1 << 16,
    batch_tokens: int = 1 << 13,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes the features of all answers. A folder that was begun is continued, whole shards being kept.

    Args:
        target: tapped at the layers of the drafters to train.
        shard_tokens: the number of tokens after which a shard is full.
        batch_tokens: about the number of tokens in a forward pass of the target.
        on_progress: called with the number of answers that have been added.

    Raises:
        DataError: the folder holds features of something else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = facts_of(target, answers)
    path = folder / FACTS
    if path.exists():
        _check(path, facts)
    else:
        path.write_text(json.dumps(facts, indent=1) + "\n")
    for number, rows in enumerate(_shards(answers.lengths.tolist(), shard_tokens)):
        shard = folder / f"features-{number:05}.safetensors"
        if _answers_in(shard) != set(rows):
            part = shard.with_suffix(".part")
            save_file(_features(target, answers, rows, batch_tokens), part, metadata={"format": "pt"})
            os.replace(part, shard)
        on_progress(len(rows))


def facts_of(target: Target, answers: AnswerDataset) -> dict:
    """What features are features of; features with other facts are refused."""
    return {
        "format": "dflash_ext.features",
        "target": Path(target.model.config.name_or_path).name,
        "weights": target.fingerprint,
        "layers": list(target.tap_ids),
        "width": len(target.tap_ids) * target.hidden_size,
        "dtype": str(target.dtype).removeprefix("torch."),
        "answers": answers.fingerprint(),
    }


class FeatureDataset(Dataset):
    """Answers with the features that `write_features` wrote: the samples of `answers`, with "features" [S, taps * H].

    Args:
        answers: the dataset that the features were written of, or a part of it.
        folder: where they were written.
        target: the target to train for, tapped at the drafter's layers.

    Raises:
        DataError: the folder holds features of another target, layers, dtype or answers, or not of all answers.
    """

    def __init__(self, answers: AnswerDataset, folder: str | Path, target: Target):
        folder = Path(folder)
        if not (folder / FACTS).exists():
            raise DataError(f"{folder}: no folder of features: it has no {FACTS}")
        _check(folder / FACTS, facts_of(target, answers))
        self.answers, self.lengths = answers, answers.lengths
        self._shard_of: dict[int, Path] = {}
        for shard in sorted(folder.glob("features-*.safetensors")):
            self._shard_of |= dict.fromkeys(_answers_in(shard), shard)
        if missing := [row for row in answers.rows.tolist() if row not in self._shard_of]:
            raise DataError(
                f"{folder}: {len(missing)} of {len(answers)} answers have no features; continue writing them"
            )

    def __len__(self) -> int:
        return len(self.answers)

    def fingerprint(self) -> str:
        """That of the answers, because the features follow from them."""
        return self.answers.fingerprint()

    def __getitem__(self, index: int) -> dict[str, Tensor | bool]:
        row = int(self.answers.rows[index])
        with safe_open(self._shard_of[row], "pt") as file:
            return {**self.answers[index], "features": file.get_tensor(str(row))}


def _check(path: Path, facts: dict) -> None:
    found = json.loads(path.read_text())
    for key, value in facts.items():
        if found.get(key) != value:
            raise DataError(
                f"{path}: features of other {key.replace('_', ' ')} ({found.get(key)}, this run has {value})"
            )


def _shards(lengths: list[int], most: int) -> list[list[int]]:
    """The answers of each shard: consecutive ones, until it has at least `most` tokens."""
    shards, tokens = [[]], 0
    for row, length in enumerate(lengths):
        if tokens >= most:
            shards.append([])
            tokens = 0
        shards[-1].append(row)
        tokens += length
    return shards


def _answers_in(shard: Path) -> set[int]:
    """The numbers of the answers whose features a shard holds; none if it is missing or was cut off."""
    try:
        with safe_open(shard, "pt") as file:
            return set(map(int, file.keys()))
    except (FileNotFoundError, SafetensorError):
        return set()


def _features(target: Target, answers: AnswerDataset, rows: list[int], batch_tokens: int) -> dict[str, Tensor]:
    """The features of each answer by its number, computed for answers of similar lengths together."""
    made: dict[str, Tensor] = {}
    left = sorted(rows, key=lambda row: int(answers.lengths[row]))
    while left:
        longest = int(answers.lengths[left[-1]])
        batch = [left.pop() for _ in range(min(len(left), max(1, batch_tokens // longest)))]
        ids = torch.nn.utils.rnn.pad_sequence([answers[row]["input_ids"] for row in batch], batch_first=True)
        features = target.features(ids.to(target.device)).cpu()
        made |= {str(row): features[i, : int(answers.lengths[row])].clone() for i, row in enumerate(batch)}
    return made
