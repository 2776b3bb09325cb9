"""The target: a frozen transformers causal LM as a drafter sees it - its embedding, head and taps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..masks import IntervalMask

ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def cache_argument(model: nn.Module | type[nn.Module]) -> str:
    """The name under which a model's forward takes its key/value cache.

    Transformers 5.24 renamed `past_key_values` to `cache`; models with code of their own may keep the older name.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Target:
    """Wraps a causal LM of transformers without changing it.

    Args:
        model: any transformers causal LM with a key/value cache (full and sliding-window attention layers).
        tap_ids: the layers whose outputs are the drafter's context features, in the drafter's order. Tap `i` is what
            transformers reports as `hidden_states[i + 1]`: the output of layer `i`, for the last layer after the
            final norm.

    Raises:
        ValueError: a tap is out of range, or the model keeps a state that cannot be rolled back (recurrent layers) or a
            kind of attention that an interval mask does not describe.
    """

    def __init__(self, model: PreTrainedModel, tap_ids: Sequence[int] = ()):
        self.model = model
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.tap_ids = tuple(tap_ids)
        self.num_layers = len(self.decoder.layers)
        self.hidden_size = self.config.hidden_size
        for tap in self.tap_ids:
            if not 0 <= tap < self.num_layers:
                raise ValueError(
                    f"tap {tap} is out of range: {type(model).__name__} has layers 0 to {self.num_layers - 1}"
                )
        self.attention_kinds = self._attention_kinds()
        self.cache_argument = cache_argument(self.decoder)

    def _attention_kinds(self) -> set[str]:
        default = "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"
        kinds = set(getattr(self.config, "layer_types", None) or [default])
        if unsupported := kinds - ATTENTION_KINDS:
            raise ValueError(
                f"{type(self.model).__name__} has layers of kind {', '.join(sorted(unsupported))}: "
                "a target needs full or sliding-window attention in every layer"
            )
        return kinds

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    @property
    def head(self) -> Tensor:
        """The weight of the language-model head, [V, H]."""
        return self.model.get_output_embeddings().weight

    @property
    def embedding_scale(self) -> float | None:
        """The factor that the model's embedding module applies to its table (Gemma), None where there is none."""
        scale = getattr(self.model.get_input_embeddings(), "scalar_embed_scale", None)
        return float(scale) if scale is not None else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """The model's own input embedding of `token_ids` [...]: [..., H]."""
        return self.model.get_input_embeddings()(token_ids)

    @contextmanager
    def _tapped(self) -> Iterator[dict[int, Tensor]]:
        outputs: dict[int, Tensor] = {}

        def keep(tap: int):
            def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
                outputs[tap] = output[0] if isinstance(output, tuple) else output

            return hook

        def module_of(tap: int) -> nn.Module:
            return self.decoder.norm if tap == self.num_layers - 1 else self.decoder.layers[tap]

        handles = [module_of(tap).register_forward_hook(keep(tap)) for tap in set(self.tap_ids)]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def _concatenate(self, outputs: dict[int, Tensor]) -> Tensor | None:
        return torch.cat([outputs[tap] for tap in self.tap_ids], dim=-1) if self.tap_ids else None

    @torch.no_grad()
    def features(self, input_ids: Tensor) -> Tensor:
        """Context features of whole sequences, without a cache and without the head: [B, S] -> [B, S, taps * H].

        Padding must be on the right: under the causal mask it then changes nothing before it.
        """
        with self._tapped() as outputs:
            self.decoder(input_ids=input_ids, use_cache=False)
        return self._concatenate(outputs)

    @torch.no_grad()
    def step(self, input_ids: Tensor, positions: Tensor, cache, *, keep_logits: int) -> tuple[Tensor, Tensor | None]:
        """Runs new tokens of every row against a cache and adds them to it.

        Args:
            input_ids: int64 [B, Q].
            positions: int64 [B, Q], each token's position in its row, -1 for padding (any column). A token sees the
                row's cached tokens before its position, and itself.
            cache: a `decode.RowCache` that was told where these tokens go (`place(positions)`).
            keep_logits: how many of the last columns get logits.

        Returns:
            logits [B, keep_logits, V] in the model's dtype and the context features [B, Q, taps * H] (None without
            taps).
        """
        with self._tapped() as outputs:
            output = self.model(
                input_ids=input_ids,
                attention_mask=self._causal_masks(positions, cache.visible),
                position_ids=positions.clamp(min=0),
                **{self.cache_argument: cache},
                use_cache=True,
                logits_to_keep=keep_logits,
            )
        return output.logits, self._concatenate(outputs)

    def _causal_masks(self, positions: Tensor, kv_len: int) -> Tensor | dict[str, Tensor]:
        """The additive masks [B, 1, Q, kv_len] of tokens at `positions`; by kind of layer if there are several."""
        end = (positions + 1).int()
        nothing = torch.zeros_like(end)
        masks = {}
        for kind in self.attention_kinds:
            start = (end - self.config.sliding_window).clamp(min=0) if kind == "sliding_attention" else nothing
            masks[kind] = IntervalMask(start, end, nothing, nothing, kv_len).to_dense(self.dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))
