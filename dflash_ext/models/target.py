"""The target, a frozen causal LM of transformers: its embedding, head and taps."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integrations.attention import NAME, as_attention_mask
from ..integrations.fused_layers import fused_forwards
from ..integrations.rotation import rotating_modules
from ..masks import IntervalMask
from ..reference.numerics import softcapped
from .isolated import Outputs, all_near, layer_outputs, near, random_states
from .taps import Taps

ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def cache_argument(model: nn.Module | type[nn.Module]) -> str:
    """The name under which a model's forward takes its key/value cache.

    Transformers 5.24 renamed `past_key_values` to `cache`; models with code of their own may keep the older name.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _plain(weight: Tensor) -> Tensor:
    """The weight itself, or the numbers that one of torchao's quantised weights stands for."""
    return weight if type(weight.data) is Tensor else weight.dequantize()


class Target:
    """Wraps a causal LM of transformers without changing what it computes.

    Args:
        model: any transformers causal LM with a key/value cache (full and sliding-window attention layers).
        tap_ids: the layers whose outputs are the drafter's context features, in the drafter's order. Tap `i` is what
            transformers reports as `hidden_states[i + 1]`: the output of layer `i`, for the last layer after the
            final norm.

    Several threads may use one target: each call reads its own taps.

    Attributes:
        layer_kinds: the kind of attention of each layer, "full_attention" or "sliding_attention".
        ranks: the number of ranks that share each layer (`share_layers`).
        max_tokens: the largest number of tokens in a row, or None if nothing bounds it. It is the number of the model's
            positions, or less where its RoPE changes beyond some length (longrope).

    Raises:
        ValueError: a tap is out of range, or the model cannot be decoded against a cache of rows: it keeps a state that
            cannot be rolled back (recurrent layers), has a kind of attention that an interval mask does not describe,
            takes no positions (ALiBi), or has no head or no list of layers.
    """

    def __init__(self, model: PreTrainedModel, tap_ids: Sequence[int] = ()):
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = _decoder(model)
        self.cache_argument = cache_argument(self.decoder)
        self._check_model()
        self.layers = self._layers()
        self.tap_ids = tuple(tap_ids)
        self.ranks = 1
        self.num_layers = len(self.layers)
        self.hidden_size = self.config.hidden_size
        self.check_taps(self.tap_ids)
        # transformers reports the decoder's own output, after the final norm, as that of the last layer.
        last = {self.num_layers - 1: self.decoder}
        self._taps = Taps({tap: last.get(tap, self.layers[tap]) for tap in set(self.tap_ids)})
        self.layer_kinds = self._layer_kinds()
        self.attention_kinds = set(self.layer_kinds)
        self.max_tokens, self._bound = self._length_bound()

    def _check_model(self) -> None:
        def refuse(why: str) -> None:
            raise ValueError(f"{type(self.model).__name__} cannot be a target: {why}")

        parameters = inspect.signature(self.decoder.forward).parameters
        if self.model._is_stateful:
            refuse("it keeps a recurrent state, which cannot be rolled back to an earlier token")
        for argument in (self.cache_argument, "attention_mask", "position_ids"):
            if argument not in parameters:
                refuse(f"its decoder takes no {argument}")
        if not self._makes("create_causal_mask"):
            refuse("its decoder makes attention masks of its own and takes none of four dimensions")
        if any(getattr(module, "is_causal", True) is False for module in self.decoder.modules()):
            refuse("its attention is not causal")
        if self.model.get_output_embeddings() is None:
            refuse("it has no language-model head")

    def _layers(self) -> nn.ModuleList:
        """The decoder's layers, whatever the name of their list."""
        layers = getattr(self.decoder, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return layers
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return module
        raise ValueError(f"{type(self.model).__name__} cannot be a target: its decoder has no one list of layers")

    def _makes(self, mask: str) -> bool:
        """Whether the decoder's forward uses this function of transformers' `masking_utils`."""
        return mask in inspect.unwrap(type(self.decoder).forward).__globals__

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raises a ValueError unless these are different layers, each with one hidden state for a tap to read."""
        name = type(self.model).__name__
        for tap in taps:
            if not 0 <= tap < self.num_layers:
                raise ValueError(f"tap {tap} is out of range: {name} has layers 0 to {self.num_layers - 1}")
        if len(set(taps)) < len(taps):
            raise ValueError(f"taps {list(taps)}: each layer can be tapped once")
        if taps and (states := getattr(self.config, "altup_num_inputs", 1)) > 1:
            raise ValueError(f"{name} cannot be tapped: its layers put out {states} hidden states each (AltUp)")

    def _layer_kinds(self) -> list[str]:
        slides = getattr(self.config, "sliding_window", None) and self._makes("create_sliding_window_causal_mask")
        default = "sliding_attention" if slides else "full_attention"
        kinds = list(getattr(self.config, "layer_types", None) or [default] * self.num_layers)
        if unsupported := set(kinds) - ATTENTION_KINDS:
            raise ValueError(
                f"{type(self.model).__name__} has layers of kind {', '.join(sorted(unsupported))}: "
                "a target needs full or sliding-window attention in every layer"
            )
        return kinds

    def _length_bound(self) -> tuple[int | None, str]:
        """The largest number of tokens in a row, and the reason for it as an error message gives it."""
        positions = getattr(self.config, "max_position_embeddings", None)
        bounds = [] if positions is None else [(positions, f"the target has {positions} positions")]
        window = getattr(self.config, "sliding_window", None)
        if window and not getattr(self.config, "layer_types", None) and "sliding_attention" not in self.attention_kinds:
            # transformers makes a sliding cache for such a config. Prefill and later steps then see different keys.
            bounds.append((window, f"its cache, but none of its masks, has a sliding window of {window}"))
        # The highest position of a forward decides on the factors of all its tokens. So a row's keys would depend on
        # drafted tokens and on other rows. (Dynamic RoPE does the same, but only beyond the model's positions.)
        rope = getattr(self.config, "rope_parameters", None) or {}
        for parameters in (rope, *(each for each in rope.values() if isinstance(each, dict))):
            if parameters.get("rope_type") == "longrope":
                switch = parameters["original_max_position_embeddings"]
                bounds.append((switch, f"the target's longrope rotates all tokens by other factors beyond {switch}"))
        return min(bounds, default=(None, ""))

    def check_length(self, tokens: int, what: str) -> None:
        """Raises a ValueError if a row of `tokens` tokens is too long for the target; `what` is the error's subject."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"{what} do not fit: {self._bound}")

    @property
    def device(self) -> torch.device:
        """The device that takes the tokens, to which accelerate also loads the weights of an offloaded model."""
        embedding = self.model.get_input_embeddings()
        if embedding.weight.is_meta:
            return torch.device(embedding._hf_hook.execution_device)
        return embedding.weight.device

    @functools.cached_property
    def is_spread(self) -> bool:
        """Whether the tensors lie on several devices, or in part where accelerate has offloaded them to."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1

    def weight_of(self, module: nn.Module) -> Tensor:
        """The weight of a module as a plain tensor on `device`.

        It is a copy if accelerate has put it elsewhere, or torchao has quantised it.
        """
        if not module.weight.is_meta:
            return _plain(module.weight).to(self.device)
        with align_module_device(module, self.device):
            return module.weight.detach()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def windows(self) -> dict[str, int | None]:
        """The window of each kind of layer; None for layers that see all earlier tokens."""
        kinds = self.attention_kinds
        return {kind: self.config.sliding_window if kind == "sliding_attention" else None for kind in kinds}

    @property
    def fingerprint(self) -> str:
        """A hash of the first numbers of every tensor, in bf16, so that the dtype of loading does not matter."""
        digest = hashlib.sha256()
        tied = self.model.get_output_embeddings() if getattr(self.config, "tie_word_embeddings", False) else None
        for name, parameter in self.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if parameter.is_meta and module is tied:  # accelerate has offloaded the one tensor twice
                continue
            with align_module_device(module):
                start = _plain(getattr(module, leaf)).detach().flatten()[:16].to(torch.bfloat16)
            digest.update(start.view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def head(self) -> Tensor:
        """The weight of the language-model head, [V, H]."""
        return self.weight_of(self.model.get_output_embeddings())

    @property
    def embedding(self) -> Tensor:
        """The table of the embedding, without its scale: [V, `embedding_size`]."""
        return self.weight_of(self.model.get_input_embeddings())

    @property
    def softcap(self) -> float | None:
        """The bound on the size of the logits (Gemma); None if there is none."""
        return getattr(self.config, "final_logit_softcapping", None) or None

    @property
    def embedding_size(self) -> int:
        """The width of the embedding's rows. Some models (OPT, Electra) project them to the hidden size."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def embedding_scale(self) -> float | None:
        """The factor that the model's embedding module applies to its table (Gemma); None if there is none."""
        scale = getattr(self.model.get_input_embeddings(), "scalar_embed_scale", None)
        return float(scale) if scale is not None else None

    def _concatenate(self, outputs: dict[int, Tensor]) -> Tensor | None:
        return torch.cat([outputs[tap].to(self.device) for tap in self.tap_ids], dim=-1) if self.tap_ids else None

    @torch.no_grad()
    def features(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Context features of whole sequences, without a cache and without the head: [B, S] -> [B, S, taps * H].

        Padding must be on the right: under the causal mask it then changes nothing before it.

        Args:
            positions: int64 [B, S] for rows of several sequences, of which a token sees its own alone: the position of
                each token in its sequence. None if each row is one sequence.

        Raises:
            ValueError: the sequences are longer than `max_tokens`, the decoder is not causal under its own masks, or it
                does not keep the sequences of a row apart.
        """
        return self.features_and_hidden(input_ids, positions)[0]

    @torch.no_grad()
    def features_and_hidden(self, input_ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `features`, and beside them the hidden states [B, S, H] to which the head is applied."""
        self.check_length(input_ids.shape[1], f"sequences of {input_ids.shape[1]} tokens")
        if not self._is_causal_by_itself:
            raise ValueError(
                f"{type(self.model).__name__} gives no context features: with attn_implementation="
                f"{self.config._attn_implementation!r}, this release of transformers lets its tokens see later ones; "
                "'eager' or a newer release may be causal"
            )
        if positions is not None and not self._keeps_sequences_apart:
            raise ValueError(
                f"{type(self.model).__name__} cannot take several sequences in a row: with "
                f"attn_implementation={self.config._attn_implementation!r}, this release of transformers lets a "
                "sequence see those before it"
            )
        with self._taps.reading() as outputs:
            hidden = self._run_whole(input_ids, positions)
        return self._concatenate(outputs), hidden

    def _run_whole(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Runs the decoder on whole sequences [B, S] under its own masks, and returns its hidden states [B, S, H]."""
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.decoder(input_ids=input_ids, position_ids=positions, use_cache=False)[0].to(self.device)

    def mask_arguments(self, masks: Mapping[str, IntervalMask], dtype: torch.dtype | None = None) -> dict:
        """The arguments under which the decoder's forward takes masks of ours, one for each kind of attention.

        `block_attn` takes them as they are. It is given them packed, too, since transformers would otherwise make masks
        of its own for every pair of tokens. Other implementations take dense masks, which have the model's own dtype:
        a mask of another one is refused by SDPA and misread by eager attention. (The probe tries other ones, `dtype`.)
        """
        is_ours, dtype = self.config._attn_implementation == NAME, dtype or self.dtype

        def given(mask: IntervalMask) -> Tensor:
            if is_ours:
                return as_attention_mask(mask)
            return mask.to_bool() if dtype == torch.bool else mask.to_dense(dtype)

        made = {kind: given(mask) for kind, mask in masks.items()}
        arguments = {"attention_mask": made if len(made) > 1 else next(iter(made.values()))}
        return arguments | ({"interval_mask": dict(masks)} if is_ours else {})

    def check_head(self) -> None:
        """Raises a ValueError unless the logits are the head's product with the hidden states, under the softcap."""
        tokens = torch.arange(4, device=self.device)[None]
        with torch.no_grad():
            logits = softcapped(nn.functional.linear(self._run_whole(tokens), self.head), self.softcap)
            if not near(self.model(input_ids=tokens, use_cache=False).logits, logits):
                raise ValueError(
                    f"{type(self.model).__name__} cannot teach its distributions: its logits are not the product of "
                    "its hidden states and its head; the cross-entropy of its tokens can be trained on"
                )

    @functools.cached_property
    def _is_causal_by_itself(self) -> bool:
        """Whether another last token leaves what every layer puts out for all earlier ones as it is, but for rounding.

        Doge is not causal in transformers 5.11: its attention adds to the causal mask, which the decoder does not make
        where SDPA has a causal mode of its own.
        """
        states = random_states(1, 4, self.hidden_size).repeat(2, 1, 1)
        states[1, -1] += 1
        tokens = torch.arange(4, device=self.device).repeat(2, 1)
        tokens[1, -1] += 1
        found = self._layer_outputs(tokens, states)
        first, second = ({name: each[row, :-1] for name, each in found.items()} for row in (0, 1))
        return all_near(first, second)

    @functools.cached_property
    def _keeps_sequences_apart(self) -> bool:
        """Whether every layer puts out the same for a sequence alone and behind another one, but for rounding.

        transformers makes the masks of such rows where positions start anew and no mask is given.
        """
        states, tokens = random_states(1, 8, self.hidden_size), torch.arange(8, device=self.device)[None]
        both = self._layer_outputs(tokens, states, tokens % 4)
        alone = self._layer_outputs(tokens[:, 4:], states[:, 4:])
        return all_near({name: each[:, 4:] for name, each in both.items()}, alone)

    def _layer_outputs(self, tokens: Tensor, states: Tensor, positions: Tensor | None = None) -> Outputs:
        """What each layer puts out for these states [B, S, H], in a forward of whole sequences."""
        return layer_outputs(self.layers, states, lambda: self._run_whole(tokens, positions))

    @functools.cached_property
    def fused_forwards(self) -> dict[nn.Module, Callable]:
        """The forwards of the decoder's modules that `fused_layers` has operators for."""
        return fused_forwards(self.decoder)

    @functools.cached_property
    def rotations(self) -> list[ModuleType]:
        """The Python modules of the decoder's layers whose rotary embedding `rotation` has an operator for."""
        return rotating_modules(self.decoder)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache,
        masks: dict[str, Tensor],
        *,
        columns: Sequence[int] | None = None,
        tapped: bool = True,
        **given,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs new tokens of every row against a cache and adds them to it.

        Args:
            input_ids: int64 [B, Q].
            positions: int64 [B, Q], each token's position in its row, or -1 for padding.
            cache: a cache of transformers, which knows where these tokens go.
            masks: the attention masks by kind of layer, as the model's attention implementation takes them.
            columns: those that get logits; None for all. Without any, the head does not run.
            tapped: whether the features are wanted.
            given: more arguments of the model's forward.

        Returns:
            logits [B, columns, V] in the model's dtype (None without columns) and the context features
            [B, Q, taps * H] (None without taps).
        """
        has_logits = columns is None or len(columns) > 0
        if has_logits:
            # An index, not a number: given a number, some models (Gemma 4) also shorten what the taps read. A list
            # indexes a tensor of any device, but the host then waits for it.
            kept = 0 if columns is None else list(columns)
            if kept and not self.is_spread:
                kept = torch.tensor(kept, device=input_ids.device)
            given["logits_to_keep"] = kept
        with self._taps.reading() as outputs:
            output = (self.model if has_logits else self.decoder)(
                input_ids=input_ids,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions.clamp(min=0),
                **{self.cache_argument: cache},
                use_cache=True,
                **given,
            )
        features = self._concatenate(outputs) if tapped else None
        return output.logits if has_logits else None, features


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal LM that ends in hidden states. For some models, `get_decoder` returns another part."""
    decoder = model.get_decoder()
    found = isinstance(decoder, PreTrainedModel) and decoder is not model
    return decoder if found else getattr(model, "model", model.base_model)
