"""Reads drafters from folders and from the hub, and writes them. Errors are one line about the checkpoint."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from ..progress import without_library_bars
from .drafter import DFlashDrafter
from .drafter_config import DFlashConfig
from .loading import HUB_NAME, default_device, first_line, hub_problem
from .speculators_layout import speculators_layout
from .target import Target

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MASK_EMBEDDING = "mask_embedding.pt"
# speculators keeps these beside a drafter in training; drafting does not need them.
_TRAINING_ONLY = {"verifier_norm.weight", "verifier_lm_head.weight"}


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silences transformers' log. Its reports of what does not fit would only repeat the one line of the error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@without_library_bars()
@_without_reports()
def load_drafter(
    name: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> DFlashDrafter:
    """A drafter in evaluation mode.

    Args:
        name: a folder, or a repository's name on the hub, with `config.json` and safetensors in the published layout or
            in that of vllm-project/speculators. Tensor names may begin with `model.`. A checkpoint may have tables of
            its own, `embed_tokens` [V, H] and `lm_head` [V or fewer, H], and `d2t` (the target's token of head row i
            is i + d2t[i]) or `t2d` (True for the target's tokens that have a row) where its head has fewer rows.
        dtype: float32 on the CPU and bfloat16 on a GPU by default.

    Raises:
        ValueError: there is no DFlash drafter, the drafter needs something that is not supported, or its tensors do not
            fit its config.
    """
    device = device or default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = _folder(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no drafter in '{name}': there is no config.json")
    try:
        config = DFlashConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds of exceptions for a broken file
        raise ValueError(f"cannot read the drafter's config in '{name}': {first_line(error)}") from error
    if config.mask_token_id is None or not config.dflash_config.get("target_layer_ids"):
        raise ValueError(f"no drafter in '{name}': its config.json has no dflash_config with mask_token_id and taps")
    try:
        tensors = _read_tensors(folder)
        _describe_tables(config, tensors)
        drafter, info = DFlashDrafter.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, in one line
        )
    except Exception as error:  # safetensors and transformers raise many kinds
        raise ValueError(f"cannot read the drafter in '{name}': {first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get(problem) or ()):
            what = f"{len(keys)} {problem.replace('_', ' ')}, such as {keys[0]}"
            raise ValueError(f"the drafter in '{name}' does not fit its config: {what}")
    return drafter.to(device).eval()


@without_library_bars()
def save_drafter(
    drafter: DFlashDrafter,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes `config.json` and `model.safetensors` in the published layout.

    A warning names each setting of this drafter that other decoders do not read.

    Args:
        dtype: the tensors' dtype, the drafter's own by default.
        max_shard_size: the largest file; a drafter that does not fit one is split into several with an index.
    """
    folder = Path(folder)
    if dtype not in (None, drafter.dtype):
        drafter = deepcopy(drafter).to(dtype)
    for old in (WEIGHTS, INDEX):  # this drafter might not overwrite these files of an earlier one
        (folder / old).unlink(missing_ok=True)
    drafter.save_pretrained(folder, max_shard_size=max_shard_size)
    unread = drafter.config.unread_elsewhere()
    if (folder / INDEX).exists():
        unread.append("speculators' converter does not read several files of weights")
    for sentence in unread:
        warnings.warn(f"the drafter in '{folder}': {sentence}", stacklevel=2)


def save_speculators_drafter(
    drafter: DFlashDrafter, target: Target, folder: str | os.PathLike, *, dtype: torch.dtype | None = None
) -> None:
    """Writes `config.json` and `model.safetensors` in the layout of vllm-project/speculators.

    This layout has the embedding and the head with the drafter, multiplied by the drafter's factors if it has any.

    Args:
        target: the drafter's. The name or folder that it was loaded from is written as that of the verifier.
        dtype: the tensors' dtype, the drafter's own by default.

    Raises:
        ValueError: the drafter was made for another target, or the layout cannot describe it.
    """
    drafter.check_target(target)
    folder, config = Path(folder), drafter.config
    written = speculators_layout(config, target)
    tables = {
        "embed_tokens.weight": drafter.embed(target, torch.arange(config.vocab_size, device=target.device)),
        "lm_head.weight": drafter.head_input(drafter.head(target)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    tensors = {
        name: tensor.clone() if not tensor.is_floating_point() else tensor.to(dtype or drafter.dtype, copy=True)
        for name, tensor in (drafter.state_dict() | tables).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _folder(name: str | os.PathLike) -> Path:
    """The folder itself, or the local copy of a repository of the hub."""
    if Path(name).is_dir():
        return Path(name)
    name = os.fspath(name)
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"no drafter in '{name}': there is no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", MASK_EMBEDDING]))
    except Exception as error:  # the hub raises many kinds
        raise ValueError(f"no drafter in '{name}': there is no such folder, {hub_problem(error)}") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors by their published names."""
    if (folder / MASK_EMBEDDING).exists():
        raise ValueError(f"{MASK_EMBEDDING} is beside the weights: a separate mask embedding is not supported")
    files = {WEIGHTS}
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    tensors = {}
    for file in sorted(files):
        for key, tensor in load_file(folder / file).items():
            name = key.removeprefix("model.")
            if name in tensors:
                raise ValueError(f"there are two tensors for {name}: its name with and without model., or in two files")
            tensors[name] = tensor
    return {key: tensor for key, tensor in tensors.items() if key not in _TRAINING_ONLY}


def _describe_tables(config: DFlashConfig, tensors: dict[str, Tensor]) -> None:
    """Notes in `config` which tables the checkpoint brings, and checks the map of a reduced vocabulary."""
    vocab, head = config.vocab_size, tensors.get("lm_head.weight")
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    config.own_embeddings, config.own_head = "embed_tokens.weight" in tensors, head is not None
    if d2t is not None:
        drafted = torch.arange(len(d2t)) + d2t
    elif t2d is not None:
        drafted = t2d.nonzero()[:, 0]
    else:
        drafted = torch.arange(vocab)
    rows = len(drafted) if head is None else len(head)
    if rows == vocab:  # a map of the whole vocabulary says nothing
        config.draft_vocab_size = None
        return
    if rows != len(drafted):
        raise ValueError(f"lm_head has {rows} rows, d2t and t2d name {len(drafted)} of the target's {vocab} tokens")
    can_draft = torch.zeros(vocab, dtype=torch.bool)
    if drafted.min() < 0 or drafted.max() >= vocab or len(drafted.unique()) != rows:
        raise ValueError(f"d2t does not name {rows} different tokens of the target's {vocab}")
    can_draft[drafted] = True
    if t2d is not None and not torch.equal(t2d.bool(), can_draft):
        raise ValueError("d2t and t2d name different tokens")
    config.draft_vocab_size = rows
    tensors |= {"d2t": drafted - torch.arange(rows), "t2d": can_draft}
