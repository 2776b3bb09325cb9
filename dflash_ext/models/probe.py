"""What has to hold before a causal LM is trained as a denoiser: it honours a mask of ours, and its parts are found.

Most of what can go wrong here raises no error: a mask that is ignored, added as 0 and 1, or replaced by a layer's own
window trains a model that sees something else than it should.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..integrations.attention import NAME
from ..masks import IntervalMask
from .isolated import isolated, random_states
from .loading import first_line
from .lora import linear_paths
from .target import Target

IMPLEMENTATIONS = (NAME, "sdpa", "eager")
LENGTH = 16  # tokens of a probe
PREFIX = 6  # causal tokens before the block of the block-wise mask
# Of the pairs of row and key that a mask shows, so many have to be seen. In half precision a key of little weight
# changes no bit, so that a layer of sharp attention (Gemma 3) sees few keys of one random input, and others of another.
ENOUGH, DRAWS = 0.5, 8


@dataclass(frozen=True)
class Verdict:
    """One line of the probe.

    Attributes:
        level: "ok"; "note", something to know or an implementation to avoid; "wrong", a reason not to train.
        subject: what was examined.
        found: what was found.
    """

    level: str
    subject: str
    found: str


def probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    targets: str | list[str] = "all",
    implementation: str = NAME,
) -> Iterator[Verdict]:
    """Examines a loaded causal LM.

    Args:
        targets: the linear layers that LoRA would adapt, as `linear_paths` takes them.
        implementation: the attention implementation that training would use. What is wrong with another one is a note.
    """
    try:
        target = Target(model)
    except ValueError as error:
        yield Verdict("wrong", "language model", str(error))
        return
    yield from _layout(target)
    yield from _adapted(target, targets)
    yield from _masks(target, implementation)
    yield _mask_token(target, tokenizer)


def _layout(target: Target) -> Iterator[Verdict]:
    """Where the language model's layers are, in the model and in the files that it was read from."""
    model = target.model
    path = next(name for name, module in model.named_modules() if module is target.layers)
    kinds = ", ".join(f"{target.layer_kinds.count(kind)} of {kind}" for kind in sorted(target.attention_kinds))
    where = f"{type(model).__name__} keeps its {target.num_layers} layers under {path} ({kinds}; {target.dtype})"
    yield Verdict("ok", "language model", where)
    if not model.name_or_path:  # made in memory
        return
    stacks = layers_in_files(Path(cached_file(model.name_or_path, "config.json")).parent)
    told = ", ".join(f"{count} under {name}" for name, count in stacks.items())
    there = "as in the model" if path in stacks else "under other names than in the model, to which they are translated"
    yield Verdict("ok", "checkpoint", f"layers: {told}; those of the language model {there}")


def layers_in_files(folder: Path) -> dict[str, int]:
    """The stacks of layers in a folder's safetensors: how many there are, by the name that their numbers follow."""
    numbers: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if found := re.match(r"(.+?)\.(\d+)\.", name):
                    numbers.setdefault(found[1], set()).add(found[2])
    return {name: len(found) for name, found in numbers.items()}


def _adapted(target: Target, targets: str | list[str]) -> Iterator[Verdict]:
    """The modules that LoRA adapts, and those whose names end in the same way but belong to other parts."""
    model = target.model
    try:
        paths = linear_paths(target, targets)
    except ValueError as error:
        yield Verdict("wrong", "adapter", str(error))
        return
    stacks = Counter(re.sub(r"\.\d+\b", ".*", path) for path in paths)
    told = ", ".join(f"{name} ({count})" for name, count in stacks.items())
    yield Verdict("ok", "adapter", f"{len(paths)} linear layers: {told}")
    leaves = {path.rpartition(".")[2] for path in paths}
    others = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves and name not in set(paths)]
    if others:
        parts = sorted({re.sub(r"\.\d+\..*", "", name) for name in others})
        yield Verdict(
            "note",
            "adapter",
            f"{len(others)} modules of other parts end in the same names and stay as they are: {', '.join(parts)}",
        )


def _mask_token(target: Target, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    token = tokenizer.mask_token_id
    if token is None:
        return Verdict("note", "mask token", "the tokenizer has none; a new one has an embedding of its own")
    if token >= target.model.get_input_embeddings().weight.shape[0]:
        return Verdict("wrong", "mask token", f"{tokenizer.mask_token} has id {token}, which the model does not embed")
    return Verdict("ok", "mask token", f"{tokenizer.mask_token} (id {token})")


def _masks(target: Target, chosen: str) -> Iterator[Verdict]:
    """Whether every kind of layer sees what a mask shows, under each implementation and in each dtype of the mask."""
    patterns = {
        "bidirectional": IntervalMask.full(LENGTH, q_len=LENGTH, device=target.device),
        "block-wise": IntervalMask.prefix_block(LENGTH, PREFIX, device=target.device),
    }
    before = target.config._attn_implementation
    try:
        for implementation in dict.fromkeys((chosen, *IMPLEMENTATIONS)):
            is_ours = implementation == NAME
            for dtype in (None,) if is_ours else dict.fromkeys((target.dtype, torch.float32, torch.bool)):
                as_trained = implementation == chosen and (is_ours or dtype == target.dtype)
                form = "interval mask" if is_ours else f"mask in {str(dtype).removeprefix('torch.')}"
                try:
                    target.decoder.set_attn_implementation(implementation)
                    seen = {name: _seen(target, mask, dtype) for name, mask in patterns.items()}
                except Exception as error:  # a refusal in whatever way the implementation refuses: it is what is told
                    level = "wrong" if as_trained else "note"
                    yield Verdict(level, f"{implementation}, {form}", f"refused: {first_line(error)}")
                    continue
                for kind in sorted(target.attention_kinds):
                    faults = [
                        fault for name in patterns for fault in _faults(target, name, kind, patterns[name], seen[name])
                    ]
                    level = "ok" if not faults else "wrong" if as_trained else "note"
                    said = "; ".join(faults) if faults else f"honoured, {' and '.join(patterns)}"
                    yield Verdict(level, f"{implementation}, {form}, {kind}", said)
    finally:
        target.decoder.set_attn_implementation(before)


def _faults(target: Target, name: str, kind: str, mask: IntervalMask, seen: Mapping[int, Tensor]) -> Iterator[str]:
    """What layers of this kind see that the mask hides, and what they do not see that it shows beyond a causal mask."""
    shown = mask.to_bool()[0, 0].cpu()
    later = _later(mask)
    layers = [layer for layer, of in enumerate(target.layer_kinds) if of == kind]
    leaks = {layer: int((seen[layer] & ~shown).sum()) for layer in layers}
    worst = max(leaks, key=leaks.__getitem__)
    if leaks[worst]:
        yield f"{name}: layer {worst} sees {leaks[worst]} of {int((~shown).sum())} pairs that the mask hides"
    shares = {layer: float(seen[layer][later].float().mean()) for layer in layers}
    worst = min(shares, key=shares.__getitem__)
    if shares[worst] < ENOUGH:
        yield f"{name}: layer {worst} sees {shares[worst]:.0%} of the later tokens that the mask shows"


def _later(mask: IntervalMask) -> Tensor:
    """The pairs that a mask shows beyond a causal one."""
    shown = mask.to_bool()[0, 0].cpu()
    return shown & torch.ones_like(shown).triu(1)


def _seen(target: Target, mask: IntervalMask, dtype: torch.dtype | None) -> dict[int, Tensor]:
    """What each layer sees of at least one random input. There are further ones while a layer sees too little."""
    later, seen = _later(mask), visible(target, mask, dtype)
    for draw in range(1, DRAWS):
        if all(float(rows[later].float().mean()) >= ENOUGH for rows in seen.values()):
            break
        more = visible(target, mask, dtype, seed=draw)
        seen = {layer: rows | more[layer] for layer, rows in seen.items()}
    return seen


@torch.no_grad()
def visible(
    target: Target, mask: IntervalMask, dtype: torch.dtype | None = None, *, seed: int = 0
) -> dict[int, Tensor]:
    """What each layer sees under a mask: by layer, bool [L, L], True where a change of a column's input changes a row.

    One forward measures all layers. Each gets the same random input in place of the output of the layer before it: in
    batch entry j, the input of token j is another one. A row's output then differs from that of the last batch entry,
    in which nothing was changed, only if the row sees token j. Keys that layers share (Gemma 4) are included.

    Args:
        mask: L rows over L keys.
        dtype: the mask is a dense one of this dtype, as models take it under other implementations than `block_attn`.
        seed: of the random inputs.
    """
    length, device = mask.kv_len, target.device
    inputs, other = random_states(2, length, target.hidden_size, seed).to(device, target.dtype)
    changed = torch.eye(length + 1, length, dtype=torch.bool, device=device)[..., None]
    inputs = torch.where(changed, other, inputs)  # [L + 1, L, H]
    found = {layer: torch.zeros(length, length, dtype=torch.bool, device=device) for layer in range(target.num_layers)}

    def compare(layer: int, _: str, output: Tensor) -> None:
        entries = output.float().flatten(2)
        difference = (entries[:-1] - entries[-1:]).abs().amax(-1)
        # Rounding may differ between batch entries by the last bits. NaN is no equality.
        rounding = max(2 * torch.finfo(output.dtype).eps, 32 * torch.finfo(torch.float32).eps)
        equal = difference <= rounding * entries[-1:].abs().amax(-1)
        found[layer] |= ~equal.T

    with isolated(target.layers, inputs, compare):
        tokens = torch.arange(length, device=device).remainder(target.vocab_size).expand(length + 1, -1)
        positions = torch.arange(length, device=device).expand_as(tokens)
        masks = target.mask_arguments(dict.fromkeys(target.attention_kinds, mask), dtype)
        target.decoder(input_ids=tokens, position_ids=positions, use_cache=False, **masks)
    return {layer: rows.cpu() for layer, rows in found.items()}
