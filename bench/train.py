"""A drafter's training step against SpecForge's, all in one run: ``python -m bench.train``.

A step is the forward and the backward at Qwen3-8B shapes, with the target's features given. SpecForge 0.2.0 takes part
where it can be imported: ``pip install --no-deps specforge==0.2.0``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench import runner
from bench.attention import BOTH
from bench.cases import error, visible_pairs
from bench.timing import gpu_turns
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

    def flops(self, visible_pairs: int) -> float:
        """The operations of a step: its matrix products, and attention over the visible pairs of each head.

        A backward counts as twice its forward (2.5 times for attention). The features and the frozen head's weight have
        no gradient, so theirs is not counted.
        """
        rows, keys = self.anchors * self.block, self.length + self.anchors * self.block
        layer = 2 * rows * self.hidden * (2 * self.heads * self.head_dim + 3 * self.intermediate)
        layer += 2 * keys * self.hidden * 2 * self.kv_heads * self.head_dim
        fuse = 2 * self.length * self.taps * self.hidden * self.hidden
        head = 2 * self.anchors * (self.block - 1) * self.hidden * self.vocab
        attention = 4 * self.heads * self.head_dim * visible_pairs
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

    def draw(self) -> tuple[Tensor, Tensor]:
        """Anchors, and which of them are kept, as the collator draws them."""
        drawn = sample_anchors(self.loss_mask.cpu(), self.shapes.anchors)
        return tuple(x.to(self.device) for x in drawn)

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


def ours(setting: Setting, batch: dict[str, Tensor], compiled: bool) -> Step:
    """The step of `dflash_ext.train`, which draws its anchors in the data loader's workers."""
    drafter = setting.drafter
    objective = DFlashObjective(drafter, setting.target, GAMMA)
    model = torch.compile(drafter, fullgraph=True, dynamic=False) if compiled else drafter

    def loss() -> Tensor:
        return objective(model, batch, setting.features).losses.sum() / objective.divisor(batch)

    return Step(loss, dict(drafter.named_parameters()))


def specforge(setting: Setting) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """SpecForge's own training module, with the weights of our drafter."""
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
    return module, dict(drafter.named_parameters())


def specforge_step(setting: Setting, module: nn.Module, parameters: dict[str, nn.Parameter], compiled: bool) -> Step:
    """A step of SpecForge's module, which draws its anchors itself."""
    run = torch.compile(module, dynamic=False) if compiled else module
    return Step(lambda: run(setting.input_ids, setting.features, setting.loss_mask)[0], parameters)


def steps_of(setting: Setting) -> tuple[dict[str, Step], dict[str, Tensor]]:
    """The steps that take part, and the batch of our own steps.

    Our steps have the anchors that SpecForge's module draws with seed 1, if it takes part.
    """
    steps, drawn = {}, setting.draw()
    if importlib.util.find_spec("specforge"):
        module, parameters = specforge(setting)
        torch.manual_seed(1)
        drawn = module._sample_anchor_positions(setting.shapes.length, setting.loss_mask, setting.device)
        steps |= {PEER + suffix: specforge_step(setting, module, parameters, bool(suffix)) for suffix in ("", COMPILED)}
    else:
        print("SpecForge is not installed: pip install --no-deps specforge==0.2.0")
    batch = setting.batch(*drawn)
    return {OURS + suffix: ours(setting, batch, bool(suffix)) for suffix in ("", COMPILED)} | steps, batch


def errors(steps: dict[str, Step]) -> dict[str, float]:
    """The error of each step's loss and gradients, compared with the eager peer's (without it, with our eager step's).

    SpecForge's compiled step draws other anchors than its eager one at the same seed, so it is not compared.

    Raises RuntimeError if ours differ by more than rounding.
    """
    base = PEER if PEER in steps else OURS
    found, wanted = {base: 0.0, PEER + COMPILED: 0.0}, None
    for impl in (base, *(name for name in steps if name.startswith(OURS) and name != base)):
        torch.manual_seed(1)
        step = steps[impl]
        loss = step()
        results = {"loss": loss} | {name: p.grad for name, p in step.parameters.items()}
        if wanted is None:
            wanted = {name: x.double() for name, x in results.items()}
            continue
        apart = {name: error(x, wanted[name]) for name, x in results.items()}
        worst = max(apart, key=apart.get)
        found[impl] = apart[worst]
        print(f"  {impl}: loss {loss.item():.4f}, off by {apart['loss']:.1e}; gradients by at most ", end="")
        print(f"{apart[worst]:.1e} ({worst})", flush=True)
        if apart[worst] > MOST_ERROR:
            raise RuntimeError(f"{impl} differs from {base} by {apart[worst]:.1e} in {worst}")
    return found


def peak_memory(step: Step) -> int:
    """The peak memory of a step in bytes, without the weights, inputs and gradients that exist before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.loss().backward()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    name, ceilings, shapes = f"train_{runner.gpu_name()}", runner.gpu_ceilings(), Shapes()
    setting = Setting(shapes, "cuda")
    steps, batch = steps_of(setting)
    mask = setting.drafter.anchor_masks(shapes.length, batch["anchors"])["full_attention"]
    flops = shapes.flops(visible_pairs(mask, 1))
    print(f"{shapes}: {flops / 1e12:.1f} TFLOP a step")
    wrong = errors(steps)
    rows = []
    for impl, timing in gpu_turns(steps, graphs=False).items():
        rate = flops / timing.ms / 1e9
        row = {"case": str(shapes), "impl": impl, "pass": BOTH, **timing.row(), "max_err": wrong[impl], "tflops": rate}
        row["share_of_matmul_rate"] = rate / ceilings["matmul_8192_bf16_tflops"]
        row["peak_gb"] = peak_memory(steps[impl]) / 1e9
        rows.append(row)
        print(f"  {impl:22} {timing.ms:7.1f} ms ({timing.low:.1f} to {timing.high:.1f}) {rate:5.0f} TFLOP/s ", end="")
        print(f"{row['share_of_matmul_rate']:.0%} of the matmul rate, {row['peak_gb']:.2f} GB", flush=True)
    ms = {row["impl"]: row["ms"] for row in rows}
    if PEER in ms:
        print(f"  ours over SpecForge's: eager {ms[OURS] / ms[PEER]:.3f}, ", end="")
        print(f"compiled {ms[OURS + COMPILED] / ms[PEER + COMPILED]:.3f}")
    print(runner.write(name, rows, ceilings))


if __name__ == "__main__":
    main()
