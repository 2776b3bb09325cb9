"""A target's forward and backward over whole sequences, with ``attn_implementation="block_attn"`` against
FlexAttention and SDPA: ``python -m bench.train_target [part of a case's name]``.

A target has four layers of its real size, no head, and a prefix-block mask. The layers of every implementation are
compiled, all of them at the same time.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Gemma3TextConfig, Gemma3TextModel, LlamaConfig, LlamaModel, PreTrainedModel

import dflash_ext.integrations  # noqa: F401  (registers block_attn)
from bench import runner
from bench.cases import BOTH, error, visible_pairs
from bench.processes import Remote, process_turns
from bench.timing import gpu_time_in_a_row
from dflash_ext import IntervalMask

BATCH, LENGTH, PREFIX, WINDOW, LAYERS = 4, 2048, 1024, 1024, 4
OURS = "block_attn"
IMPLEMENTATIONS = (OURS, "flex_attention", "sdpa")
FULL, SLIDING = "full_attention", "sliding_attention"


def llama() -> PreTrainedModel:
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    return LlamaModel(LlamaConfig(**sizes, head_dim=128, num_hidden_layers=LAYERS, vocab_size=256, pad_token_id=0))


def gemma3() -> PreTrainedModel:
    sizes = dict(hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    kinds = dict(layer_types=[SLIDING] * (LAYERS - 1) + [FULL], sliding_window=WINDOW)
    return Gemma3TextModel(Gemma3TextConfig(**sizes, **kinds, num_hidden_layers=LAYERS, vocab_size=256))


CASES = {"Llama 3 8B": llama, "Gemma 3 4B": gemma3}
MASKS = {
    FULL: IntervalMask.prefix_block(LENGTH, PREFIX),
    SLIDING: IntervalMask.sliding_window(LENGTH, WINDOW),
}
MASK_MODS = {
    FULL: lambda b, h, q, k: (k <= q) | (q >= PREFIX),
    SLIDING: lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
}


def masks_of(implementation: str, kinds: list[str]) -> dict:
    """The arguments that give a model its masks, by kind of layer, as each implementation's users write them."""
    if implementation == OURS:
        masks = {kind: MASKS[kind].to("cuda") for kind in kinds}
        return {"interval_mask": masks}
    if implementation == "flex_attention":
        masks = {kind: create_block_mask(MASK_MODS[kind], None, None, LENGTH, LENGTH, device="cuda") for kind in kinds}
    else:
        masks = {kind: MASKS[kind].to("cuda").to_bool() for kind in kinds}
    return {"attention_mask": masks if len(kinds) > 1 else masks[kinds[0]]}


@dataclass
class Step:
    """A model whose layers are compiled, its masks, and an input and an upstream gradient."""

    model: PreTrainedModel
    masks: dict
    embeds: Tensor
    upstream: Tensor

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        self.embeds.grad = None
        out = self.model(inputs_embeds=self.embeds, use_cache=False, **self.masks).last_hidden_state
        out.backward(self.upstream)
        return out.detach()

    def time(self) -> float:
        return gpu_time_in_a_row(self)

    def save(self, path: Path) -> None:
        """Writes the output of a step and the gradients of the weights of attention."""
        out = self()
        grads = {name: weight.grad for name, weight in self.model.named_parameters() if "self_attn" in name}
        save_file({"output": out} | grads, path)


def make(case: str, implementation: str) -> Step:
    """The step of an implementation, which has run once. Weights, input and gradient are the same for all of them."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = CASES[case]().train()
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(implementation)
    kinds = list(dict.fromkeys(kinds_of(model)))
    shape = BATCH, LENGTH, model.config.hidden_size
    embeds, upstream = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    embeds.requires_grad_()  # otherwise the first layer needs a graph of its own
    for layer in model.layers:
        layer.compile(dynamic=False)
    step = Step(model, masks_of(implementation, kinds), embeds, upstream)
    step()
    return step


def kinds_of(model: PreTrainedModel) -> list[str]:
    return getattr(model.config, "layer_types", None) or [FULL] * LAYERS


def flops(case: str) -> float:
    """The arithmetic of a step: 6 operations for a weight and token, and attention over visible pairs."""
    with torch.device("meta"):
        model = CASES[case]()
    config = model.config
    weights = sum(weight.numel() for layer in model.layers for weight in layer.parameters() if weight.dim() > 1)
    pairs = sum(visible_pairs(MASKS[kind], BATCH) for kind in kinds_of(model))
    return 6.0 * BATCH * LENGTH * weights + 3.5 * 4.0 * config.num_attention_heads * config.head_dim * pairs


def errors(steps: dict[str, Remote]) -> dict[str, float]:
    """The largest error of each step's output and gradients, compared with SDPA's."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for implementation, step in steps.items():
            step.ask("save", Path(folder) / implementation)
        wanted = load_file(Path(folder) / "sdpa", device="cuda")
        for implementation in steps:
            got = load_file(Path(folder) / implementation, device="cuda")
            found[implementation] = max(error(x, wanted[name].double()) for name, x in got.items())
    return found


def rows_of(case: str, steps: dict[str, Remote], matmul_tflops: float) -> list[dict]:
    name = f"{case}, {LAYERS} layers, prefix {PREFIX} + block {LENGTH - PREFIX}, B{BATCH}"
    print(name, flush=True)
    timings, wrong, needed, rows = process_turns(steps), errors(steps), flops(case), []
    for implementation, timing in timings.items():
        rate, off = needed / timing.ms / 1e9, wrong[implementation]
        row = {"case": name, "impl": implementation, "pass": BOTH, **timing.row(), "max_err": off}
        rows.append(row | {"tflops": rate, "share_of_matmul_rate": rate / matmul_tflops})
        print(f"  {implementation:16} {timing.ms:6.1f} ms ({timing.low:.1f} to {timing.high:.1f}) ", end="")
        print(f"{rate:4.0f} TFLOP/s {rate / matmul_tflops:.0%} of the matmul rate, {off:.1e} from SDPA's", flush=True)
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    name, ceilings = f"train_target_{runner.gpu_name()}", runner.gpu_ceilings()
    cases = {
        case: {implementation: Remote(make, case, implementation) for implementation in IMPLEMENTATIONS}
        for case in CASES
        if wanted in case
    }
    rows = [row for case, steps in cases.items() for row in rows_of(case, steps, ceilings["matmul_8192_bf16_tflops"])]
    if not wanted:
        print(runner.write(name, rows, ceilings))


if __name__ == "__main__":
    main()
