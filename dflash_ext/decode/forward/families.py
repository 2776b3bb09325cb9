"""Which models have a forward of our own, and where their weights are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import ACT2FN

from ...models import DFlashDrafter, Target
from .layers import LayerWeights, Stack, rotary_tables
from .packing import packed

# By the class of the model: whether its norms multiply by 1 + weight.
FAMILIES = {
    "LlamaForCausalLM": False,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": False,
    "Qwen3ForCausalLM": False,
    "Gemma2ForCausalLM": True,
    "Gemma3ForCausalLM": True,
}
_ACTIVATIONS = {type(ACT2FN["silu"]): "silu", type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh"}


def has_lean_forward(target: Target) -> bool:
    """Whether `target_stack` can be made: the family is known, and its modules are what transformers makes them.

    That is not so with an adapter, a quantised or offloaded weight, layers on several devices, or sizes that the
    kernels do not have.
    """
    model = target.model
    if type(model).__name__ not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
        return False
    head = model.get_output_embeddings()
    projections = [projection for layer in target.layers for projection in _linears(layer)]
    kinds = {(type(p.data), p.dtype, p.device) for p in model.parameters()}
    first = target.layers[0]
    return (
        all(type(module) is nn.Linear for module in [*projections, head])
        and len(kinds) == 1
        and type(head.weight.data) is Tensor
        and not head.weight.is_meta
        and head.bias is None
        and type(first.mlp.act_fn) in _ACTIVATIONS
        and first.self_attn.head_dim % 8 == 0
        and first.self_attn.head_dim <= 512
        and all(width % 8 == 0 for width in (target.hidden_size, first.mlp.gate_proj.out_features))
    )


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def target_stack(target: Target, length: int) -> Stack:
    """The layers of a target that `has_lean_forward`; `length` positions get rotary tables."""
    kinds = getattr(target.config, "layer_types", None) or [next(iter(target.attention_kinds))] * target.num_layers
    rotary = target.decoder.rotary_emb
    # Beyond its last position a model's rotary module may change the factors of all positions.
    length = min(length, target.max_tokens or length)
    like = target.head
    by_kind = hasattr(rotary, "layer_types")  # Gemma 3: a base for each kind of layer
    tables = {
        kind: rotary_tables(rotary, like, length, **({"layer_type": kind} if by_kind else {})) for kind in set(kinds)
    }
    return _stack(
        list(target.layers),
        kinds,
        tables,
        final_norm=target.decoder.norm,
        config=target.config,
        plus_one=FAMILIES[type(target.model).__name__],
    )


def drafter_stack(drafter: DFlashDrafter, length: int) -> Stack:
    """The layers of a drafter, whose blocks run over a cache as a target's rows do."""
    tables = rotary_tables(drafter.rotary_emb, drafter.fc.weight, length)
    kinds = drafter.config.layer_types
    return _stack(
        list(drafter.layers),
        kinds,
        dict.fromkeys(kinds, tables),
        final_norm=drafter.norm,
        config=drafter.config,
        plus_one=False,
    )


def _stack(
    layers: list[nn.Module],
    kinds: list[str],
    rotary: dict[str, tuple[Tensor, Tensor]],
    *,
    final_norm: nn.Module,
    config,
    plus_one: bool,
) -> Stack:
    attention = layers[0].self_attn
    return Stack(
        layers=[_weights(layer, kind) for layer, kind in zip(layers, kinds, strict=False)],
        final_norm=final_norm.weight.detach(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        rotary=rotary,
        scale=float(getattr(attention, "scaling", attention.head_dim**-0.5)),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        eps=config.rms_norm_eps,
        plus_one=plus_one,
        activation=_ACTIVATIONS[type(layers[0].mlp.act_fn)],
    )


def _weights(layer: nn.Module, kind: str) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    has_post_norms = hasattr(layer, "post_feedforward_layernorm")
    mlp_norm = layer.pre_feedforward_layernorm if has_post_norms else layer.post_attention_layernorm
    qkv, qkv_bias = _projections(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _projections(mlp.gate_proj, mlp.up_proj)
    return LayerWeights(
        kind=kind,
        attention_norm=_weight(layer.input_layernorm),
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=_weight(getattr(attention, "q_norm", None)),
        k_norm=_weight(getattr(attention, "k_norm", None)),
        out=_weight(attention.o_proj),
        out_bias=_of(attention.o_proj, "bias"),
        after_attention=_weight(layer.post_attention_layernorm) if has_post_norms else None,
        mlp_norm=_weight(mlp_norm),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=_weight(mlp.down_proj),
        down_bias=_of(mlp.down_proj, "bias"),
        after_mlp=_weight(layer.post_feedforward_layernorm) if has_post_norms else None,
    )


def _projections(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    biases = [linear.bias for linear in linears]
    return packed([linear.weight for linear in linears]), None if biases[0] is None else packed(biases)


def _of(module: nn.Module | None, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return None if value is None else value.detach()


def _weight(module: nn.Module | None) -> Tensor | None:
    return _of(module, "weight")


def embedding_of(target: Target) -> Callable[[Tensor], Tensor]:
    """The target's own embedding of tokens, its scale included."""
    return target.model.get_input_embeddings()
