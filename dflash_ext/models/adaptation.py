"""What turns a causal LM into a denoiser: a LoRA adapter or new weights, and the embedding of a masked token."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..integrations.fused_layers import replaced_forwards
from ..masks import IntervalMask
from .denoising_masks import CONTEXTS, PATTERNS, denoising_masks
from .full_weights import FullWeights, load_full_weights
from .loading import first_line
from .lora import LoraAdapter, LoraDrafter, LoraDrafterConfig, save_lora_drafter
from .lora.adapter import with_update
from .lora.config import check_identity, identity_of
from .lora.peft_files import load_adapter, save_adapter
from .lora.rows import planned, recomputed
from .target import Target

CONFIG, WEIGHTS = "denoiser.json", "denoiser.safetensors"
KINDS = ("whole", "gated", "full")


@dataclass(frozen=True)
class AdaptationConfig:
    """How a denoiser was trained, as far as decoding and evaluation need to know it.

    Attributes:
        base: what the base is known by (`identity_of`).
        mask_id: the token that stands for a masked position. It may be the first number behind the vocabulary, for
            bases that have no token to spare. None is for uniform-state diffusion (`UniformAdaptation`).
        pattern, context, block_size: as in `denoising_masks`.
        kind: "whole": a LoRA adapter that acts on every token. "gated": one that acts on the tokens of denoising blocks
            alone, so that the base itself reads what comes before them. "full": no adapter, but all weights.

    Raises:
        ValueError: a setting is out of range.
    """

    base: dict[str, Any]
    mask_id: int | None
    pattern: str = "prefix_block"
    context: str = "causal"
    block_size: int | None = None
    kind: str = "whole"

    def __post_init__(self):
        for name, known in (("pattern", PATTERNS), ("context", CONTEXTS), ("kind", KINDS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is '{value}': {', '.join(known)} are supported")
        if self.pattern == "block_causal" and self.block_size is None:
            raise ValueError("the pattern block_causal needs a block size")
        if self.pattern != "block_causal" and self.block_size is not None:
            raise ValueError(
                f"a block size goes with the pattern block_causal alone, and the pattern is {self.pattern}"
            )
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}: at least 1 is needed")
        if self.context == "block_causal" and self.pattern != "block_causal":
            raise ValueError(f"with the pattern {self.pattern} the context is causal")
        if self.context == "block_causal" and self.kind == "gated":
            raise ValueError("a gated denoiser's context is causal: the base reads it")
        if self.mask_id is not None and not 0 <= self.mask_id <= self.base["vocab_size"]:
            raise ValueError(f"mask token {self.mask_id}: the base has {self.base['vocab_size']} tokens")

    def check_target(self, target: Target) -> None:
        """Raises a ValueError, which names the first difference, unless the adaptation was made for this base."""
        check_identity(self.base, target, "denoiser", "model")


class Adaptation(nn.Module):
    """A LoRA adapter or new weights for the language model, and the embedding that stands in for masked tokens.

    The base is never changed, and its table never has the mask's embedding: with tied weights that would change the
    head, too. The logits of a position predict the token at that same position.

    Args:
        target: the base, frozen. It is no submodule.
        adapter: what is trained, as the config's kind says.

    Attributes:
        mask_embedding: [H], as the first layer takes it: a scale of the base's embedding (Gemma) is already in it.
    """

    def __init__(self, target: Target, config: AdaptationConfig, adapter: LoraAdapter | FullWeights):
        super().__init__()
        config.check_target(target)
        self.target, self.config, self.adapter = target, config, adapter
        self.mask_embedding = nn.Parameter(torch.empty(target.embedding_size))
        self.recomputes = False
        self._compiled: Callable | None = None

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        mask_id: int | None,
        pattern: str = "prefix_block",
        context: str = "causal",
        block_size: int | None = None,
        kind: str = "whole",
        rank: int = 16,
        alpha: float | None = 32,
        targets: str | list[str] = "all",
        seed: int = 0,
    ) -> Adaptation:
        """A new adaptation in float32 on the target's device, whose random weights follow from `seed`.

        The mask's embedding starts as that of the mask token, or for a new token as the mean over the vocabulary.

        Args:
            mask_id, pattern, context, block_size, kind: as in `AdaptationConfig`.
            rank, alpha, targets: as in `LoraAdapter.for_target`; full weights have none of them.
        """
        config = AdaptationConfig(identity_of(target), mask_id, pattern, context, block_size, kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "full":
                adapter = FullWeights.for_target(target)
            else:
                adapter = LoraAdapter.for_target(target, targets=targets, rank=rank, alpha=alpha)
            adaptation = cls(target, config, adapter)
        adaptation.begin()
        return adaptation.to(target.device)

    @torch.no_grad()
    def begin(self) -> None:
        """Gives the mask its first embedding."""
        mask_id, embedding = self.config.mask_id, self.target.model.get_input_embeddings()
        if mask_id < embedding.weight.shape[0]:
            start = embedding(torch.tensor([mask_id], device=self.target.device))[0]
        else:
            start = embedding.weight.float().mean(dim=0) * (self.target.embedding_scale or 1.0)
        self.mask_embedding.copy_(start)

    def as_drafter(self, block_size: int = 8) -> LoraDrafter:
        """A drafter for the base: with the adapter it drafts a block, and without it it verifies.

        A block is a denoising block whose first token, the anchor, is right and whose others are masked. What comes
        before it is the prefix, which the adapter reads, too. Where it is gated, the anchor belongs to the prefix.

        Args:
            block_size: the slots of a block, the anchor included. Decoding may choose another number.
        """
        config = LoraDrafterConfig(
            self.config.base,
            self.stand_in,
            kind=self.config.kind,
            block_size=block_size,
            causal=self.config.pattern == "causal",
        )
        drafter = LoraDrafter(config, self.adapter)
        drafter.mask_embedding = self.mask_embedding
        return drafter

    @property
    def stand_in(self) -> int:
        """The token that the base reads at masked positions, where a model embeds tokens per layer, too (Gemma 4)."""
        return self.config.mask_id if self.config.mask_id < self.target.vocab_size else 0

    @property
    def head(self) -> Tensor:
        """The weight of the head that these hidden states are for, [V, H]."""
        return self.adapter.weight_of(self.target, self.target.model.get_output_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        masks: Mapping[str, IntervalMask],
        adapted: Tensor | None = None,
    ) -> Tensor:
        """The hidden states [B, L, H] of tokens, after the final norm; the head turns them into logits.

        Args:
            input_ids: int64 [B, L].
            hidden: bool [B, L], the tokens that are masked, whatever `input_ids` has there.
            positions: int64 [B, L].
            masks: by kind of layer.
            adapted: bool [B, L], the tokens on which a gated adapter acts; None is for all.
        """

        def embed(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return self.embedded(output, hidden)

        with ExitStack() as acting:
            hook = self.target.model.get_input_embeddings().register_forward_hook(embed)
            acting.callback(hook.remove)
            acting.enter_context(self._acting(adapted))
            if self.recomputes and torch.is_grad_enabled():
                acting.enter_context(recomputed(self.target))
            return self._run(input_ids.masked_fill(hidden, self.stand_in), positions, masks)

    @contextmanager
    def _acting(self, rows: Tensor | None) -> Iterator[None]:
        """Within it, the base runs with the adapter or the new weights: compiled, or with fused norms and gated MLPs.

        rows: as `adapted` in `forward`.
        """
        target = self.target
        if self._compiled is not None:
            layers = {layer: partial(self._compiled, layer, *of, rows) for layer, of in self._halves().items()}
            with replaced_forwards(layers):
                yield
            return
        fused = target.fused_forwards  # the modules are compared before the adapter acts on these rows alone
        with self.adapter.applied(target.model, rows), replaced_forwards(fused):
            yield

    def _halves(self) -> dict[nn.Module, tuple[tuple[str, ...], list[tuple[Tensor, Tensor]], float]]:
        """What `_with_adapter` takes behind each layer."""
        adapter, found = self.adapter, {}
        names = {module: name for name, module in self.target.model.named_modules()}
        for layer in self.target.layers:
            own = [path for path in adapter.paths if path.startswith(names[layer] + ".")]
            relative = tuple(path.removeprefix(names[layer] + ".") for path in own)
            found[layer] = relative, [adapter.halves(path) for path in own], adapter.scale
        return found

    def compile(self, **options: Any) -> None:
        """Compiles the base's layers with their parts of the adapter. Layers of a kind share one graph.

        Raises a ValueError for full weights.
        """
        if self.config.kind == "full":
            raise ValueError("torch.compile is supported with an adapter, and not with full weights")
        self._compiled = torch.compile(_with_adapter, **options)

    def gradient_checkpointing_enable(self, **_) -> None:
        """Makes each layer of the base compute its results again in the backward."""
        self.recomputes = True

    activation_checkpointing_enable = gradient_checkpointing_enable  # the name from transformers 5.24 on

    def embedded(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The input of the layers [B, L, H], given the base's embeddings and the masked tokens (bool [B, L])."""
        return torch.where(hidden.unsqueeze(-1), self.mask_embedding.to(embedded.dtype), embedded)

    def of_denoiser(self) -> dict[str, Tensor | nn.Module]:
        """What a `Denoiser` has of it beside the weights, by the names of its fields."""
        return {"mask_embedding": self.mask_embedding.detach().to(self.target.dtype)}

    def own_tensors(self) -> dict[str, Tensor]:
        """What is trained beside the adapter, by name."""
        adapter = {id(parameter) for parameter in self.adapter.parameters()}
        return {name: each.detach() for name, each in self.named_parameters() if id(each) not in adapter}

    def inputs(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, IntervalMask], Tensor | None]:
        """What `forward` takes for a batch of `NoiseCollator`.

        With the pattern block_causal, the rows of [B, 2 S] tokens hold the noised ones and, behind them, the right
        ones.
        """
        config = self.config
        masks = self._masks(batch, config.pattern, context=config.context, block_size=config.block_size)
        ids, hidden, positions = batch["input_ids"], batch["hidden"], positions_of(batch)
        adapted = None
        if config.kind == "gated":
            adapted = torch.arange(ids.shape[1], device=ids.device) >= batch["blocks"]
        if config.pattern == "block_causal":
            ids, positions = (torch.cat([rows, rows], dim=1) for rows in (ids, positions))
            hidden = torch.cat([hidden, torch.zeros_like(hidden)], dim=1)
            adapted = None if adapted is None else torch.cat([adapted, torch.zeros_like(adapted)], dim=1)
        return ids, hidden, positions, masks, adapted

    @torch.no_grad()
    def base_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The hidden states [B, S, H] of the base, without the adapter, on the right tokens under a causal mask."""
        masks = self._masks(batch, "causal")
        with replaced_forwards(self.target.fused_forwards):
            return self._run(batch["input_ids"], positions_of(batch), masks)

    def _masks(self, batch: Mapping[str, Tensor], pattern: str, **options) -> dict[str, IntervalMask]:
        return planned(self.target, denoising_masks(batch, self.target.windows, pattern, **options))

    def _run(self, ids: Tensor, positions: Tensor, masks: Mapping[str, IntervalMask]) -> Tensor:
        given = self.target.mask_arguments(masks)
        return self.target.decoder(input_ids=ids, position_ids=positions, use_cache=False, **given)[0]


def _with_adapter(
    layer: nn.Module,
    names: tuple[str, ...],
    halves: list[tuple[Tensor, Tensor]],
    scale: float,
    rows: Tensor | None,
    *args,
    **kwargs,
) -> Any:
    """A layer's own forward with the adapter's halves on the linear layers of these names, in these rows alone."""
    with ExitStack() as hooks:
        for name, (a, b) in zip(names, halves, strict=True):

            def update(_, inputs: tuple[Tensor], output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return with_update(output, inputs[0], a, b, scale, rows)

            hooks.callback(layer.get_submodule(name).register_forward_hook(update).remove)
        return type(layer).forward(layer, *args, **kwargs)


def positions_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The position of each token in its document: int64 [B, S]."""
    starts = batch["starts"]
    return torch.arange(starts.shape[1], device=starts.device) - starts


def save_adaptation(
    adaptation: Adaptation,
    folder: str | os.PathLike,
    *,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an adaptation. PEFT reads the folder as that of a plain adapter, and transformers reads full weights.

    With an adapter and a mask token it is the folder of a LoRA drafter, too.

    Args:
        base_name: the base's folder or name on the hub, for PEFT's users.
        dtype: that of the tensors, the adaptation's own by default.
    """
    folder = Path(folder)
    if adaptation.config.kind == "full":
        adaptation.adapter.save(folder, adaptation.target.model, dtype=dtype)
    elif adaptation.config.mask_id is None:
        save_adapter(adaptation.adapter, folder, base_name=base_name, dtype=dtype)
    else:
        save_lora_drafter(adaptation.as_drafter(), folder, base_name=base_name, dtype=dtype)
    own = {name: each.to("cpu", dtype or each.dtype).contiguous() for name, each in adaptation.own_tensors().items()}
    save_file(own, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(asdict(adaptation.config), indent=1) + "\n")


def load_adaptation(folder: str | os.PathLike, target: Target) -> Adaptation:
    """Reads an adaptation for `target` in its own dtype, on the target's device. Without a mask token, it is uniform.

    Raises:
        ValueError: there is none, it was made for another base, or its tensors do not fit.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no denoiser in '{folder}': there is no {CONFIG}")
    try:
        config = AdaptationConfig(**json.loads((folder / CONFIG).read_text()))
        own = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises many kinds
        raise ValueError(f"cannot read the denoiser in '{folder}': {first_line(error)}") from error
    kind = Adaptation
    if config.mask_id is None:
        from .uniform import UniformAdaptation as kind
    adaptation = kind(target, config, (load_full_weights if config.kind == "full" else load_adapter)(folder, target))
    for name, tensor in adaptation.own_tensors().items():
        if name not in own or own[name].shape != tensor.shape:
            found = "no" if name not in own else f"another shape of, {list(own[name].shape)},"
            raise ValueError(f"the denoiser in '{folder}' has {found} {name}; {list(tensor.shape)} is needed")
        tensor.copy_(own[name])
    return adaptation.to(target.device)
