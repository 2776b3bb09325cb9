"""A drafter's training step against SpecForge's, all in one run: ``python -m bench.train``.

A step is the forward and the backward at Qwen3-8B shapes, with the target's features given. SpecForge 0.2.0 takes part
where it can be imported: ``pip install --no-deps specforge==0.2.0``. Under torch.compile our drafter is one graph. Of
SpecForge's, each layer and the loss are one.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench import runner
from bench.cases import BOTH, error
from bench.processes import Remote, process_turns
from bench.timing import gpu_time_in_a_row
from dflash_ext.models import DFlashDrafter, Target
from dflash_ext.train import build_blocks, sample_anchors
from dflash_ext.train.objectives import DFlashObjective

OURS, PEER, COMPILED = "dflash_ext", "SpecForge", ", compiled"
GAMMA = 7.0  # the paper's decay for blocks of 16

# The largest difference, relative to the whole, between steps in bfloat16 that add up in different orders.
MOST_ERROR = 0.03


@dataclass(frozen=True)
class Shapes:
    """The sizes of a step. The defaults are those of a drafter for Qwen3-8B."""

    length: int = 3072
    anchors: int = 512
    block: int = 16
    layers: int = 5
    taps: int = 5
    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936
    target_layers: int = 36

    def __str__(self) -> str:
        return f"S{self.length}, {self.anchors} anchors x {self.block}, {self.layers} layers, H{self.hidden}"

    def flops(self) -> float:
        """The arithmetic that a step needs: of its matrix products, and of attention over pairs that are visible.

        A backward counts twice its forward, 2.5 times in attention. What needs no gradient, the features and the frozen
        head's weight, is left out. On average an anchor stands in the middle of the sequence.
        """
        rows, keys = self.anchors * self.block, self.length + self.anchors * self.block
        layer = 2 * rows * self.hidden * (2 * self.heads * self.head_dim + 3 * self.intermediate)
        layer += 2 * keys * self.hidden * 2 * self.kv_heads * self.head_dim
        fuse = 2 * self.length * self.taps * self.hidden * self.hidden
        head = 2 * self.anchors * (self.block - 1) * self.hidden * self.vocab
        attention = 4 * self.heads * self.head_dim * rows * (self.length / 2 + self.block)
        return 3 * self.layers * layer + 2 * fuse + 2 * head + 3.5 * self.layers * attention


class Setting:
    """A target's tables, a drafter for it, and one batch with its features, all in bfloat16 on one device."""

    def __init__(self, shapes: Shapes, device: str):
        self.shapes, self.device = shapes, device
        config = Qwen3Config(
            vocab_size=shapes.vocab,
            hidden_size=shapes.hidden,
            intermediate_size=shapes.intermediate,
            num_hidden_layers=shapes.target_layers,
            num_attention_heads=shapes.heads,
            num_key_value_heads=shapes.kv_heads,
            head_dim=shapes.head_dim,
            max_position_embeddings=40960,
            rope_theta=1e6,
        )
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):  # only the target's embedding and head are used
            model = Qwen3ForCausalLM(config)
        with torch.device(device):
            embedding = nn.Embedding(shapes.vocab, shapes.hidden).requires_grad_(False)
            head = nn.Linear(shapes.hidden, shapes.vocab, bias=False).requires_grad_(False)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
        self.embedding, self.head = embedding, head
        self.target = Target(model)
        self.mask_token = shapes.vocab - 1
        with torch.device(device):
            self.drafter = DFlashDrafter.for_target(
                self.target,
                mask_token_id=self.mask_token,
                num_layers=shapes.layers,
                block_size=shapes.block,
                taps=shapes.taps,
            ).train()
        torch.set_default_dtype(torch.float32)
        self.input_ids = torch.randint(self.mask_token, (1, shapes.length), device=device)
        self.loss_mask = torch.ones_like(self.input_ids, dtype=torch.bool)
        width = shapes.taps * shapes.hidden
        self.features = torch.randn(1, shapes.length, width, device=device, dtype=torch.bfloat16)

    def batch(self, anchors: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """The batch that the collator makes of the sequence and these anchors."""
        sizes = {"block_size": self.shapes.block, "mask_token_id": self.mask_token}
        blocks = build_blocks(self.input_ids, self.loss_mask, anchors, keep, **sizes)
        return {"input_ids": self.input_ids, "anchors": anchors, "keep": keep, **vars(blocks)}


@dataclass
class Step:
    """An implementation of the step.

    Attributes:
        loss: runs the forward.
        parameters: by name. The names and values are the same for all implementations.
    """

    loss: Callable[[], Tensor]
    parameters: dict[str, nn.Parameter]

    def __call__(self) -> Tensor:
        """Makes the gradients and returns the loss."""
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def time(self) -> float:
        return gpu_time_in_a_row(self)

    def peak_memory(self) -> int:
        """The peak memory of a step in bytes, without the weights, inputs and gradients that exist before it."""
        self()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.loss().backward()
        return torch.cuda.max_memory_allocated() - before

    def save(self, path: Path) -> None:
        """Writes the loss and the gradients of a step. Its anchors are those that SpecForge draws at the seed 1."""
        torch.manual_seed(1)
        loss = self()
        save_file({"loss": loss} | {name: p.grad for name, p in self.parameters.items()}, path)


def anchors_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """Anchors, and which of them are kept: those that SpecForge draws at the seed 1, if it is installed."""
    if not has_peer():
        return tuple(x.to(setting.device) for x in sample_anchors(setting.loss_mask.cpu(), setting.shapes.anchors))
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel

    torch.manual_seed(1)
    sampler = SimpleNamespace(num_anchors=setting.shapes.anchors)
    return OnlineDFlashModel._sample_anchor_positions(sampler, setting.shapes.length, setting.loss_mask, setting.device)


def has_peer() -> bool:
    return importlib.util.find_spec("specforge") is not None


def ours(setting: Setting, compiled: bool) -> Step:
    """The step of `dflash_ext.train`, which draws its anchors in the data loader's workers."""
    drafter, batch = setting.drafter, setting.batch(*anchors_of(setting))
    objective = DFlashObjective(drafter, setting.target, GAMMA)
    if compiled:
        drafter.compile(fullgraph=True, dynamic=False)

    def loss() -> Tensor:
        return objective(batch, setting.features).losses.sum() / objective.divisor(batch)

    return Step(loss, dict(drafter.named_parameters()))


def specforge(setting: Setting, compiled: bool) -> Step:
    """The step of SpecForge's own training module, which draws its anchors itself, with the weights of our drafter."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel

    config = Qwen3Config(**setting.drafter.config.to_dict())
    config._attn_implementation = "flex_attention"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(setting.device):
        drafter = DFlashDraftModel(config).train()
    torch.set_default_dtype(torch.float32)
    drafter.load_state_dict(setting.drafter.state_dict())
    module = OnlineDFlashModel(
        drafter,
        setting.head,
        setting.embedding,
        setting.mask_token,
        setting.shapes.block,
        num_anchors=setting.shapes.anchors,
        loss_decay_gamma=GAMMA,
    )
    if compiled:  # in pieces, because the whole module is still compiling after minutes
        for layer in drafter.layers:
            layer.compile(dynamic=False)
        module._dflash_objective_chunk_terms = torch.compile(module._dflash_objective_chunk_terms, dynamic=False)
    return Step(
        lambda: module(setting.input_ids, setting.features, setting.loss_mask)[0], dict(drafter.named_parameters())
    )


IMPLEMENTATIONS = {OURS: ours, PEER: specforge}


def make(impl: str, shapes: Shapes, device: str) -> Step:
    """The step of an implementation, which has run once. Weights and inputs are the same for all of them."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    name = impl.removesuffix(COMPILED)
    step = IMPLEMENTATIONS[name](Setting(shapes, device), compiled=impl != name)
    step()
    return step


def errors(steps: dict[str, Remote]) -> dict[str, float]:
    """The error of each step's loss and gradients, compared with the eager peer's (without it, with our eager step's).

    Raises RuntimeError if a step differs by more than rounding.
    """
    base, found = PEER if PEER in steps else OURS, {}
    with tempfile.TemporaryDirectory() as folder:
        for impl, step in steps.items():
            step.ask("save", Path(folder) / impl)
        wanted = {name: x.double() for name, x in load_file(Path(folder) / base, device="cuda").items()}
        for impl in steps:
            got = load_file(Path(folder) / impl, device="cuda")
            apart = {name: error(x, wanted[name]) for name, x in got.items()}
            worst = max(apart, key=apart.get)
            found[impl] = apart[worst]
            print(
                f"  {impl:22} loss {got['loss'].item():.4f}, off by {apart['loss']:.1e}; gradients by at most ", end=""
            )
            print(f"{apart[worst]:.1e} ({worst})", flush=True)
            if apart[worst] > MOST_ERROR:
                raise RuntimeError(f"{impl} differs from {base} by {apart[worst]:.1e} in {worst}")
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    name, shapes = f"train_{runner.gpu_name()}", Shapes()
    ceilings = runner.gpu_ceilings()
    if not has_peer():
        print("SpecForge is not installed: pip install --no-deps specforge==0.2.0")
    libraries = [OURS, PEER] if has_peer() else [OURS]
    steps = {
        library + suffix: Remote(make, library + suffix, shapes, "cuda")
        for suffix in ("", COMPILED)
        for library in libraries
    }
    timings = process_turns(steps)
    flops = shapes.flops()
    print(f"{shapes}: {flops / 1e12:.1f} TFLOP a step")
    wrong = errors(steps)
    rows = []
    for impl, timing in timings.items():
        rate, peak = flops / timing.ms / 1e9, steps[impl].ask("peak_memory") / 1e9
        share = rate / ceilings["matmul_8192_bf16_tflops"]
        row = {"case": str(shapes), "impl": impl, "pass": BOTH, **timing.row(), "max_err": wrong[impl], "tflops": rate}
        rows.append(row | {"share_of_matmul_rate": share, "peak_gb": peak})
        print(f"  {impl:22} {timing.ms:7.1f} ms ({timing.low:.1f} to {timing.high:.1f}) {rate:5.0f} TFLOP/s ", end="")
        print(f"{share:.0%} of the matmul rate, {peak:.2f} GB", flush=True)
    ms = {row["impl"]: row["ms"] for row in rows}
    if has_peer():
        print(f"  ours over SpecForge's: eager {ms[OURS] / ms[PEER]:.3f}, ", end="")
        print(f"compiled {ms[OURS + COMPILED] / ms[PEER + COMPILED]:.3f}")
    print(runner.write(name, rows, ceilings))


if __name__ == "__main__":
    main()
