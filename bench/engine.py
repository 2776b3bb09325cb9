"""The decode engine at the shapes of real models, with random weights, beside other loops: ``python -m bench.engine``.

A row is the time of a plain step, or of a cycle of drafting and verifying, as a replay of the engine's own CUDA graph.
Exact decoding and the memory have rows of their own. ``bench.auto`` measures the choice of "auto".
"""

from __future__ import annotations

import argparse
import gc
import math
import time

import torch

from bench import engine_peers, runner
from bench.engine_models import SHAPES, bytes_of, caches_of, loaded, pair, replay, timed
from dflash_ext.decode import Engine, decode
from dflash_ext.models import DFlashDrafter, Target

PARTS = ("engine", "exact", "memory", "peers", "compiled")
LONG = 16384  # the second context of a single row
Models = tuple[Target, DFlashDrafter]


class Bench:
    """The rows of one shape."""

    def __init__(self, name: str, models: Models, copy_tbs: float):
        self.name, self.copy_tbs, self.rows = name, copy_tbs, []
        self.target, self.drafter = models

    def add(self, batch: int, context: int, impl: str, which: str, row: dict) -> None:
        case = f"{self.name}, batch {batch}, ctx {context}"
        row = {"case": case, "impl": impl, "pass": which} | row
        if which in ("plain step", "cycle"):
            total = bytes_of(self.target, self.drafter if which == "cycle" else None, batch, context)
            row |= {"gbs": total / row["ms"] / 1e6, "bound_ms": total / self.copy_tbs / 1e9}
        self.rows.append(row)
        notes = [f"{name} {row[name]}" for name in ("workspace_mb", "tokens", "ratio") if name in row]
        print(f"  {case:34} {impl:34} {which:11} {row['ms']:8.3f} ms  {'  '.join(notes)}", flush=True)

    def engine(self, batch: int, context: int, *, exact: bool = False) -> None:
        for which, draft in (("plain step", None), ("cycle", self.drafter)):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            engine = loaded(self.target, draft, batch, context, exact=exact)
            row = timed(replay(engine, batch), 60).row()
            used = torch.cuda.max_memory_allocated() - before - sum(cache.bytes for cache in caches_of(engine))
            self.add(batch, context, "dflash_ext, exact" if exact else "dflash_ext", which, row | _mb(used))
            del engine

    def memory(self, batch: int, context: int) -> None:
        """Requests from their prompts to their ends. The memory is beyond the models and the caches.

        The time is that of a second run, which captures no graphs.
        """
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine = Engine(self.target, self.drafter, slots=batch, max_length=context + 64)
        for _ in range(2):
            for prompt in self.prompts(batch, context).tolist():
                engine.submit(prompt, max_new_tokens=16)
            begin = time.perf_counter()
            engine.run()
            torch.cuda.synchronize()
            ms = 1e3 * (time.perf_counter() - begin)
        used = torch.cuda.max_memory_allocated() - before - sum(cache.bytes for cache in caches_of(engine))
        self.add(batch, context, "dflash_ext", "prompts and 16 tokens", {"ms": ms} | _mb(used))

    def peers(self, batch: int, context: int, *, compiled: bool) -> None:
        prompts = self.prompts(batch, context)
        name = "compiled" if compiled else "eager"
        found = {
            (f"transformers, static cache, {name}", "plain step"): lambda: engine_peers.static_cache(
                self.target, prompts, compiled=compiled
            )
        }
        if batch == 1 and not compiled:
            loop = engine_peers.transformers_loop
            found["transformers, DFlash loop", "cycle"] = lambda: loop(self.target, self.drafter, prompts)
            if engine_peers.has_zlab():
                for which, block in (("plain step", 1), ("cycle", self.drafter.config.block_size)):
                    found["z-lab, dflash", which] = lambda block=block: engine_peers.zlab_loop(
                        self.target, self.drafter, prompts, block=block
                    )
        decoded = decode(self.target, None, prompts[:1].tolist(), max_new_tokens=engine_peers.NEW)
        mine = decoded.completions[0].tokens
        for (impl, which), run in found.items():
            row, tokens = run()
            self.add(batch, context, impl, which, row | {"tokens": self.agreement(prompts[0].tolist(), mine, tokens)})

    def agreement(self, prompt: list[int], mine: list[int], theirs: list[int]) -> str:
        """Whether two answers are equal, or how far their first different tokens are apart under the model."""
        count = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
        if count is None:
            return "equal"
        ids = torch.tensor([prompt + mine[:count]], device="cuda")
        logits = self.target.model(ids, logits_to_keep=1).logits[0, -1].float()
        apart = (logits[mine[count]] - logits[theirs[count]]).abs().item()
        return f"equal up to token {count}, where two logits are {apart:.4f} apart"

    def prompts(self, batch: int, context: int) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randint(3, self.target.vocab_size, (batch, context), device="cuda")

    def check(self) -> None:
        """Decoded tokens are the model's own: nearly without regret, and in exact mode the same with any draft."""
        prompts = [torch.randint(3, 1000, (n,)).tolist() for n in (5, 40, 17)]
        for draft in (self.drafter, None):
            decoded = decode(self.target, draft, prompts, max_new_tokens=24)
            regret = max(self.regret(*pair) for pair in zip(prompts, decoded.completions, strict=True))
            assert math.isfinite(regret) and regret < 0.2, regret
        exact = [
            [c.tokens for c in decode(self.target, draft, prompts, max_new_tokens=24, exact=True).completions]
            for draft in (self.drafter, None)
        ]
        assert exact[0] == exact[1], "exact decoding depends on the draft"
        print(f"{self.name}: regret {regret:.4f} nats at most; exact decoding gives equal tokens", flush=True)

    def regret(self, prompt: list[int], completion) -> float:
        """How many nats less likely than the best token a greedy token was at most, under the model's own logits."""
        ids = torch.tensor([prompt + completion.tokens], device="cuda")
        logp = self.target.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        chosen = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
        return (logp.amax(-1) - chosen).max().item()


def _mb(used: int) -> dict:
    return {"workspace_mb": round(used / 1e6, 1)}


def copy_rate() -> float:
    """Terabytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    copy = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: copy.copy_(source), 5).ms / 1e9


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    given = parser.parse_args()
    name, copy_tbs, rows = f"engine_{runner.gpu_name()}", copy_rate(), []
    for shape in given.shapes:
        bench = Bench(shape, pair(SHAPES[shape]), copy_tbs)
        bench.check()
        context = given.context
        for batch in given.batches:
            if "engine" in given.parts:
                bench.engine(batch, context)
        if "engine" in given.parts:
            bench.engine(1, LONG)
        for batch in given.batches:
            if "exact" in given.parts and batch <= 8:
                bench.engine(batch, context, exact=True)
        if "memory" in given.parts:
            bench.memory(given.batches[-1], context)
        for part in ("peers", "compiled"):
            for batch in given.batches:
                if part in given.parts:
                    bench.peers(batch, context, compiled=part == "compiled")
        rows += bench.rows
        print(runner.write(name, rows, {"copy_tbs": copy_tbs}), flush=True)
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    print(runner.plot(name, rows, "gbs"))


if __name__ == "__main__":
    main()
