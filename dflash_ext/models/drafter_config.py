"""The published configuration of a DFlash drafter: Qwen3's keys and those of block diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import Qwen3Config

from .target import Target


def default_taps(num_target_layers: int, count: int) -> list[int]:
    """The layers that the DFlash paper taps: `count` of them, evenly from layer 1 to the third from last.

    A target too shallow for that is tapped up to its last layer.
    """
    if not 1 <= count < num_target_layers:
        most = num_target_layers - 1
        raise ValueError(f"{count} taps are not supported: a target of {num_target_layers} layers takes 1 to {most}")
    if count == 1:
        return [num_target_layers // 2]
    last = num_target_layers - 3 if num_target_layers - 3 >= count else num_target_layers - 1
    return [round(1 + i * (last - 1) / (count - 1)) for i in range(count)]


class DFlashConfig(Qwen3Config):
    """Reads and writes `config.json` of the published checkpoints.

    `block_size` may stand at the top level or inside `dflash_config`; `mask_token_id` and `target_layer_ids` stand
    inside. Optional keys, in either place: `is_causal`, `input_embedding_scale`, `output_multiplier`,
    `final_logit_softcapping`.
    """

    block_size: int | None = None
    num_target_layers: int | None = None
    dflash_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.dflash_config = dict(self.dflash_config or {})
        # transformers' own DFlash loop reads these at the top level, the published layout nests them.
        for key in ("mask_token_id", "target_layer_ids"):
            if key in kwargs:
                self.dflash_config.setdefault(key, kwargs.pop(key))
        if self.block_size is None:
            self.block_size = self.dflash_config.get("block_size", 16)
        super().__post_init__(**kwargs)
        self.architectures = ["DFlashDraftModel"]
        self._check()

    def _check(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}: a block is an anchor and at least one drafted slot (2)")
        if not self.dflash_config.get("target_layer_ids"):
            if self.num_target_layers is None:
                return  # transformers builds default configs; a drafter cannot be made from one
            self.dflash_config["target_layer_ids"] = default_taps(self.num_target_layers, self.num_hidden_layers)
        taps, mask = self.target_layer_ids, self.mask_token_id
        if not isinstance(taps, list) or not all(type(tap) is int and tap >= 0 for tap in taps):
            raise ValueError(f"target_layer_ids is {taps!r}: a list of layer numbers is needed")
        if mask is not None and (type(mask) is not int or not 0 <= mask < self.vocab_size):
            raise ValueError(f"mask_token_id is {mask!r}: a token of the vocabulary of {self.vocab_size} is needed")

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        mask_token_id: int,
        num_layers: int = 5,
        block_size: int = 16,
        taps: Sequence[int] | int = 5,
        intermediate_size: int | None = None,
    ) -> DFlashConfig:
        """The configuration of a new drafter of the target's width, heads and rotary base.

        Args:
            mask_token_id: the token in slots 1..B-1, in the target's vocabulary.
            taps: layer ids, or how many to choose by `default_taps`.
            intermediate_size: width of the MLPs, the target's by default.
        """
        base = target.config
        if not 0 <= mask_token_id < target.vocab_size:
            raise ValueError(f"mask token {mask_token_id} is not in the target's vocabulary of {target.vocab_size}")
        tap_ids = default_taps(target.num_layers, taps) if isinstance(taps, int) else list(taps)
        if not tap_ids:
            raise ValueError("a drafter needs at least one tap")
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: a drafter has at least one layer")
        if bad := [t for t in tap_ids if not 0 <= t < target.num_layers]:
            raise ValueError(f"tap {bad[0]} is out of range: the target has layers 0 to {target.num_layers - 1}")
        dflash = {"mask_token_id": mask_token_id, "target_layer_ids": tap_ids}
        if target.embedding_scale is not None:
            dflash["input_embedding_scale"] = target.embedding_scale
        if getattr(base, "final_logit_softcapping", None):
            dflash["final_logit_softcapping"] = base.final_logit_softcapping
        return cls(
            block_size=block_size,
            dflash_config=dflash,
            num_target_layers=target.num_layers,
            num_hidden_layers=num_layers,
            hidden_size=base.hidden_size,
            intermediate_size=intermediate_size or base.intermediate_size,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_key_value_heads or base.num_attention_heads,
            head_dim=getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
            max_position_embeddings=base.max_position_embeddings,
            rms_norm_eps=base.rms_norm_eps,
            rope_theta=_rope_theta(base),
            vocab_size=target.vocab_size,
        )

    @property
    def mask_token_id(self) -> int | None:
        return self.dflash_config.get("mask_token_id")

    @property
    def target_layer_ids(self) -> list[int]:
        return self.dflash_config["target_layer_ids"]

    def optional(self, key: str) -> Any:
        """One of the optional keys, from `dflash_config` or the top level; None where it is not set."""
        return self.dflash_config.get(key, getattr(self, key, None))

    def attention_kinds(self) -> Iterator[tuple[str, bool, int | None]]:
        """(kind of layer, causal inside the block, window) for each kind that the drafter has.

        Full layers are bidirectional in the block and sliding layers causal, unless `is_causal` says otherwise.
        """
        causal = self.optional("is_causal")
        for kind in sorted(set(self.layer_types)):
            sliding = kind == "sliding_attention"
            yield kind, sliding if causal is None else causal, self.sliding_window if sliding else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> DFlashConfig:
        """Reads the published layout; its empty `rope_scaling` would be taken for a deprecated setting."""
        given = {k: v for k, v in config_dict.items() if (k, v) != ("rope_scaling", None)}
        return super().from_dict(given, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The published layout: `rope_theta` and `rope_scaling` instead of transformers' `rope_parameters`."""
        config = super().to_dict()
        rope = dict(config.pop("rope_parameters", None) or {})
        config["rope_theta"] = rope.pop("rope_theta", None)
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        config["architectures"] = ["DFlashDraftModel"]
        return config


def _rope_theta(config) -> float:
    """The rotary base of full-attention layers, wherever this kind of config keeps it."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)
