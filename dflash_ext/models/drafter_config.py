"""The configuration of a DFlash drafter in the published layout: Qwen3's keys and those of block diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import Qwen3Config

from .speculators_layout import published_layout
from .target import Target

LAYER_KINDS = ("full_attention", "sliding_attention")
WINDOW_CONVENTIONS = ("zlab", "speculators")
NOISES = ("mask", "uniform")

# Optional keys that are written only where they are set.
_OPTIONAL_FIELDS = {
    "is_causal": None,
    "sample_from_anchor": False,
    "window_convention": "zlab",
    "noise": "mask",
    "own_embeddings": False,
    "own_head": False,
    "draft_vocab_size": None,
}

# Keys of published checkpoints that change what a drafter computes and that are not implemented. The value beside a key
# changes nothing and is accepted.
_UNSUPPORTED = {
    "query_zero_predicts_next": False,
    "shift_label": False,
    "use_swa": False,
    "swa_window_size": 0,
    "attention_value_scale": 1,
    "attention_sink_bias": False,
    "add_swa_attention_sink_bias": False,
    "add_full_attention_sink_bias": False,
    "causal_head": False,
    "logit_scale": 1,
    "partial_rotary_factor": 1,
    "rope_is_neox_style": True,
    "is_neox_style": True,
    "use_aux_hidden_state": True,
    "projector_type": None,
    "quantization_config": None,
    "markov_rank": 0,
    # DFlash 2
    "conv_kernel_size": 0,
    "conv_group_size": 0,
    "selector_rank": 0,
    "selector_top_k": 0,
}


def default_taps(num_target_layers: int, count: int | None = None) -> list[int]:
    """The layers that the DFlash paper taps: `count` of them, evenly from layer 1 to the third from last.

    A target too shallow for that is tapped up to its last layer. The default is 5, or fewer if it has fewer layers.
    """
    count = min(5, num_target_layers - 1) if count is None else count
    if not 1 <= count < num_target_layers:
        most = num_target_layers - 1
        raise ValueError(f"{count} taps are not supported: a target of {num_target_layers} layers takes 1 to {most}")
    if count == 1:
        return [num_target_layers // 2]
    last = num_target_layers - 3 if num_target_layers - 3 >= count else num_target_layers - 1
    return [round(1 + i * (last - 1) / (count - 1)) for i in range(count)]


class DFlashConfig(Qwen3Config):
    """Reads and writes `config.json` of published checkpoints, and reads `config.json` of speculators' checkpoints.

    `mask_token_id` and `target_layer_ids` are inside `dflash_config`, and `block_size` is there or at the top level. If
    a key is in both places, the one inside counts, as for z-lab and SGLang. Optional keys:

    - `is_causal`, at the top level: whether a slot sees only the slots of its block up to itself, in all layers. By
      default sliding layers are causal and full ones are not. vLLM's `dflash_config.causal` is read if it is missing.
    - `sample_from_anchor`, in either place: slot k predicts the token at anchor + k + 1, slot 0 included, instead of
      the one at anchor + k.
    - `input_embedding_scale`, `output_multiplier`, `final_logit_softcapping` (0 or less is none), in either place.
    - `window_convention`, this package's own: what a sliding window hides, "zlab" (the default) or "speculators"; see
      `IntervalMask.anchor_blocks`.
    - `noise`, this package's own: what stands in the slots behind the anchor, "mask" (the default) for the mask token
      or "uniform" for random tokens, which each step of denoising draws anew.

    `own_embeddings`, `own_head` and `draft_vocab_size` describe a checkpoint's tensors: whether it brings an embedding
    or a head instead of the target's, and the number of the target's tokens that it can draft. `load_drafter` sets
    them by the tensors' names.

    Raises:
        ValueError: a value is out of range, or a key changes the computation and is not implemented.
    """

    block_size: int | None = None
    num_target_layers: int | None = None
    dflash_config: dict[str, Any] | None = None
    is_causal: bool | None = None
    sample_from_anchor: bool = False
    window_convention: str = "zlab"
    noise: str = "mask"
    own_embeddings: bool = False
    own_head: bool = False
    draft_vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        dflash = self.dflash_config = dict(self.dflash_config or {})
        # transformers' own DFlash loop reads these keys at the top level. The published layout nests them.
        for key in ("mask_token_id", "target_layer_ids"):
            if key in kwargs:
                dflash.setdefault(key, kwargs.pop(key))
        for key in ("block_size", "num_target_layers", "sample_from_anchor"):
            if (inside := dflash.pop(key, None)) is not None:
                setattr(self, key, inside)
        self.block_size = 16 if self.block_size is None else self.block_size
        causal = dflash.pop("causal", None)
        self.is_causal = causal if self.is_causal is None else self.is_causal
        kwargs.pop("auto_map", None)  # names code that is not written with the drafter
        self._refuse_unsupported(kwargs)
        super().__post_init__(**kwargs)
        self.architectures = ["DFlashDraftModel"]
        self._check()

    def _refuse_unsupported(self, others: dict[str, Any]) -> None:
        dflash = self.dflash_config
        given = {**(self.rope_parameters or {}), **others, **dflash}
        for key, neutral in _UNSUPPORTED.items():
            if given.get(key) not in (None, neutral):
                raise ValueError(f"{key} is {given[key]!r}: drafters with this key are not supported")
        for name in self.architectures or ():
            if name.startswith("DFlash2") or "DSpark" in name or "Domino" in name:
                raise ValueError(f"the architecture {name} is not supported: DFlashDraftModel is")
        if (width := others.get("target_hidden_size")) not in (None, self.hidden_size):
            raise ValueError(f"target_hidden_size is {width}, hidden_size {self.hidden_size}: they must be equal")
        if "layer_ids" in dflash and "target_layer_ids" not in dflash:
            raise ValueError("dflash_config has layer_ids: the taps are read from target_layer_ids")
        if "is_causal" in dflash:
            raise ValueError("is_causal is inside dflash_config: it is read at the top level only")
        if set(LAYER_KINDS) & set(self.rope_parameters or ()):
            raise ValueError("rope_parameters differ by kind of layer: one set of them for all layers is supported")
        kinds = self.layer_types
        if kinds is not None and len(kinds) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(kinds)} entries, the drafter {self.num_hidden_layers} layers")
        if unknown := set(kinds or ()) - set(LAYER_KINDS):
            raise ValueError(f"layer_types has {sorted(unknown)[0]!r}: {' and '.join(LAYER_KINDS)} are supported")

    def _check(self) -> None:
        for name, given in (("is_causal", self.is_causal), ("sample_from_anchor", self.sample_from_anchor)):
            if given not in (None, True, False):
                raise ValueError(f"{name} is {given!r}: true or false is needed")
        least = 1 + self.first_draft_slot
        if type(self.block_size) is not int or self.block_size < least:
            what = "at least one slot" if least == 1 else "an anchor and at least one drafted slot (2)"
            raise ValueError(f"block_size is {self.block_size}: a block is {what}")
        if "sliding_attention" in self.layer_types and (self.sliding_window or 0) < 1:
            raise ValueError("layer_types has sliding_attention: use_sliding_window and a sliding_window are needed")
        if self.window_convention not in WINDOW_CONVENTIONS:
            names = " and ".join(WINDOW_CONVENTIONS)
            raise ValueError(f"window_convention is {self.window_convention!r}: {names} are supported")
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}: {' and '.join(NOISES)} are supported")
        if self.noise == "uniform" and self.sample_from_anchor:
            raise ValueError("noise is 'uniform': slot 0 is the anchor, so that sample_from_anchor is not supported")
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
        taps: Sequence[int] | int | None = None,
        intermediate_size: int | None = None,
        noise: str = "mask",
        sample_from_anchor: bool = False,
    ) -> DFlashConfig:
        """The configuration of a new drafter with the target's width, heads and rotary base.

        If the target's layers differ, the drafter takes after the first one. Usual values replace what the target's
        configuration does not have.

        Args:
            mask_token_id: the token in slots 1..B-1. It must be in the target's vocabulary.
            taps: layer ids, or the number of layers that `default_taps` chooses; None leaves it that number, too.
            intermediate_size: the width of the MLPs. The default is the target's.
            noise: what stands in the slots that are drafted, as in the class.
            sample_from_anchor: slot 0, which holds the anchor, drafts, too.

        Raises:
            ValueError: a number is out of range, or the target's embedding or head is not of its hidden size.
        """
        base = target.config
        if not 0 <= mask_token_id < target.vocab_size:
            raise ValueError(f"mask token {mask_token_id} is not in the target's vocabulary of {target.vocab_size}")
        tap_ids = list(taps) if isinstance(taps, Sequence) else default_taps(target.num_layers, taps)
        if not tap_ids:
            raise ValueError("a drafter needs at least one tap")
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: a drafter has at least one layer")
        target.check_taps(tap_ids)
        for name, width in (("embedding", target.embedding_size), ("head", target.head.shape[1])):
            if width != target.hidden_size:
                raise ValueError(
                    f"a drafter for {type(target.model).__name__} is not supported: its {name} has width {width}, "
                    f"its hidden states have {target.hidden_size}"
                )
        heads = _of_first_layer(base, "num_attention_heads")
        kv_heads = _of_first_layer(base, "num_key_value_heads") or heads
        head_dim = _of_first_layer(base, "head_dim") or base.hidden_size // heads
        dflash = {"mask_token_id": mask_token_id, "target_layer_ids": tap_ids}
        if target.embedding_scale is not None:
            dflash["input_embedding_scale"] = target.embedding_scale
        if getattr(base, "final_logit_softcapping", None):
            dflash["final_logit_softcapping"] = base.final_logit_softcapping
        return cls(
            block_size=block_size,
            noise=noise,
            sample_from_anchor=sample_from_anchor,
            dflash_config=dflash,
            num_target_layers=target.num_layers,
            num_hidden_layers=num_layers,
            hidden_size=base.hidden_size,
            intermediate_size=intermediate_size or _of_first_layer(base, "intermediate_size") or 4 * base.hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads if heads % kv_heads == 0 else heads,
            head_dim=-(-head_dim // 8) * 8,  # as block_attn needs it
            max_position_embeddings=target.max_tokens or cls.max_position_embeddings,
            rms_norm_eps=getattr(base, "rms_norm_eps", None) or 1e-6,
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
        """The value of an optional key in `dflash_config` or at the top level; None if it is not set."""
        return self.dflash_config.get(key, getattr(self, key, None))

    @property
    def first_draft_slot(self) -> int:
        """The first slot whose output is a draft; a block of B slots drafts `B - first_draft_slot` tokens."""
        return 0 if self.sample_from_anchor else 1

    def attention_kinds(self) -> Iterator[tuple[str, bool, int | None]]:
        """(kind of layer, causal inside the block, window) for each kind that the drafter has.

        Full layers are bidirectional in the block and sliding layers causal, unless `is_causal` says otherwise.
        """
        for kind in sorted(set(self.layer_types)):
            sliding = kind == "sliding_attention"
            causal = sliding if self.is_causal is None else bool(self.is_causal)
            yield kind, causal, self.sliding_window if sliding else None

    @property
    def own_tables(self) -> bool:
        """Whether drafts are made with an embedding, a head or a vocabulary other than the target's."""
        return self.own_embeddings or self.own_head or self.draft_vocab_size is not None

    @property
    def shared_window(self) -> bool:
        """Whether all slots of a block share the anchor's window, as in speculators."""
        return self.window_convention == "speculators" and "sliding_attention" in self.layer_types

    def unread_elsewhere(self) -> list[str]:
        """The settings of this drafter that vLLM or SGLang do not read, one sentence each."""
        unread = []
        if self.sample_from_anchor:
            unread.append("vLLM's DFlash does not read sample_from_anchor and drafts from slot 1 on")
        if self.shared_window:
            unread.append("vLLM and SGLang give each slot a window of its own instead of the anchor's")
        if self.own_tables:
            unread.append("SGLang uses the target's embedding and head instead of the drafter's own")
        if self.noise == "uniform":
            unread.append("vLLM and SGLang fill blocks with the mask token instead of random tokens")
        for key in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping"):
            if self.optional(key) not in (None, 0, 1):
                unread.append(f"vLLM's and SGLang's DFlash do not read {key}")
        return unread

    def unread_by_loop(self) -> str | None:
        """The setting of this drafter with which transformers' own DFlash loop would go wrong, or None."""
        if self.sample_from_anchor:
            return "does not read sample_from_anchor"
        if self.shared_window:
            return "keeps too little context for speculators' windows"
        if self.noise == "uniform":
            return "fills blocks with the mask token instead of random tokens"
        return "uses the target's embedding and head instead of the drafter's own" if self.own_tables else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> DFlashConfig:
        """Reads the published layout and speculators'."""
        if "speculators_model_type" in config_dict:
            config_dict = published_layout(config_dict)
        # An empty `rope_scaling` would be taken for a deprecated setting.
        given = {k: v for k, v in config_dict.items() if (k, v) != ("rope_scaling", None)}
        return super().from_dict(given, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The published layout: `rope_theta` and, where it is scaled, `rope_scaling` instead of `rope_parameters`."""
        config = super().to_dict()
        rope = dict(config.pop("rope_parameters", None) or {})
        config["rope_theta"] = rope.pop("rope_theta", None)
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
        config["architectures"] = ["DFlashDraftModel"]
        for key, unset in _OPTIONAL_FIELDS.items():
            if config[key] == unset:
                del config[key]
        return config


def _rope_theta(config) -> float:
    """The rotary base of full-attention layers, wherever this kind of config keeps it."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


def _of_first_layer(config, name: str) -> int | None:
    """A size of the target's first layer (layers may differ, as in Gemma 4 and Gemma 3n); None if it has none."""
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[0]
    value = getattr(config, name, None)
    return value[0] if isinstance(value, list) else value
