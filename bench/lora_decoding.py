"""Real decoding with LoRA drafters, beside plain decoding and a DFlash drafter: ``python -m bench.lora_decoding``.

    python -m bench.lora_decoding --target smollm2 --prompts gsm8k_test.jsonl mt_bench.jsonl \\
        --drafters gated whole dflash --limits 12 32 32

Each folder is a drafter of either kind. A LoRA drafter with a sampler head is measured with the head and without it, a
gated one with one forward a cycle and with two. `--rows` takes other numbers of mask rows than it was trained with, and
`--groups` other numbers of groups than the engine's own. A row of the results has tau and the tokens a second of all
rows of a batch, prefill and captures of graphs left out, and the memory beyond the weights.
`results/lora_decoding_<gpu>.svg` plots the speeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bench import runner
from dflash_ext.data import encode_all, read_conversations
from dflash_ext.decode import decode
from dflash_ext.models import (
    LoraDrafter,
    Target,
    is_lora_drafter,
    load_drafter,
    load_lora_drafter,
    load_target,
    stop_tokens,
)


def ways(
    model: PreTrainedModel, folders: Sequence[Path], row_counts: Sequence[int], group_counts: Sequence[int] = ()
) -> Iterator[tuple[str, Target, object, dict]]:
    """Plain decoding, and each drafter with each number of forwards that it has, and of mask rows and groups."""
    target = Target(model)
    yield "plain", target, None, {}
    for folder in folders:
        if not is_lora_drafter(folder):
            drafter = load_drafter(folder, dtype=model.dtype, device=model.device)
            yield folder.name, Target(model, drafter.config.target_layer_ids), drafter, {}
            continue
        for drafter, rows in product(with_and_without_head(folder, target), row_counts or (None,)):
            kind, head = drafter.config.kind, ", head" if drafter.sampler else ""
            rows = rows or drafter.config.drafted
            cycles = [(1, groups) for groups in group_counts or (None,)] if kind == "gated" else []
            for forwards, groups in [*cycles, (2, None)]:
                name = f"{folder.name}, {kind}{head}, {rows} rows, {forwards} a cycle"
                options = {"forwards": forwards, "block_size": rows + 1, "groups": groups}
                yield name + (f", {groups} groups" if groups else ""), target, drafter, options


def with_and_without_head(folder: Path, target: Target) -> Iterator[LoraDrafter]:
    """The LoRA drafter in a folder and, if it has a sampler head, the same one without it."""
    drafter = load_lora_drafter(folder, target)
    yield drafter
    if drafter.sampler is not None:
        bare = load_lora_drafter(folder, target)
        bare.sampler, bare.config = None, replace(bare.config, sampler_width=None)
        yield bare


def generate_speed(model: PreTrainedModel, prompts: Sequence[Sequence[int]], stops: Sequence[int], new: int) -> float:
    """The tokens a second of transformers' `generate`, greedy, for one batch. Prompts are padded on the left."""
    most = max(map(len, prompts))
    ids = torch.tensor([[stops[0]] * (most - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    there = torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    options = {"do_sample": False, "eos_token_id": list(stops), "pad_token_id": stops[0]}
    model.generate(ids, attention_mask=there, max_new_tokens=4, **options)
    start = time.perf_counter()
    made = model.generate(ids, attention_mask=there, max_new_tokens=new, **options)[:, most:].cpu()
    seconds = time.perf_counter() - start
    ended = torch.isin(made, torch.tensor(stops)).cumsum(dim=1)
    return int((ended == 0).sum() + (ended[:, -1] > 0).sum()) / seconds


def plot(rows: Sequence[dict], path: Path) -> None:
    """Tokens a second over plain decoding's: a panel for each set and temperature, a group of bars for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    impls = list(dict.fromkeys(row["impl"] for row in rows))
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        stem, batch, temperature = row["case"].split(", ")
        panels.setdefault(f"{stem}, {temperature}", {}).setdefault(batch, {})[row["impl"]] = row["times_plain"]
    size = {"figsize": (9, 2.6 * len(panels)), "layout": "constrained"}
    figure, axes = pyplot.subplots(len(panels), squeeze=False, **size)
    for axis, (title, batches) in zip(axes[:, 0], panels.items(), strict=True):
        for index, impl in enumerate(impls):
            width, heights = 0.85 / len(impls), [found.get(impl, 0.0) for found in batches.values()]
            axis.bar([group + index * width for group in range(len(batches))], heights, width, label=impl)
        axis.set_xticks([group + 0.4 for group in range(len(batches))], list(batches))
        axis.set_ylabel("x plain decoding")
        axis.set_title(title, fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=3)
    figure.savefig(path)


def parameters(drafter: torch.nn.Module | None) -> int:
    return sum(p.numel() for p in drafter.parameters()) if drafter else 0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--drafters", nargs="+", type=Path, required=True)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--temperatures", nargs="*", type=float, default=[0.0, 1.0])
    parser.add_argument("--rows", nargs="*", type=int, default=[])
    parser.add_argument("--groups", nargs="*", type=int, default=[], help="groups of a cycle of one forward")
    parser.add_argument("--limits", nargs="*", type=int, default=[80], help="prompts of a set, one number or by batch")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--generate-tokens", type=int, default=64)
    given = parser.parse_args()
    name = f"lora_decoding_{runner.gpu_name()}"
    model, tokenizer = load_target(given.target)
    limits = {"max_new_tokens": given.max_new_tokens, "stop_token_ids": stop_tokens(tokenizer, model)}
    rows, chosen = [], list(ways(model, given.drafters, given.rows, given.groups))
    counts = given.limits if len(given.limits) > 1 else given.limits * len(given.batches)
    limit_of = dict(zip(given.batches, counts, strict=True))
    for path, temperature, batch in product(given.prompts, given.temperatures, given.batches):
        asked = read_conversations(path, limit=limit_of[batch])
        prompts = list(encode_all(asked, tokenizer, max_prompt_tokens=2048).values())
        case, plain = f"{path.stem}, batch {batch}, T={temperature:g}", None
        for impl, target, drafter, options in chosen:
            torch.cuda.reset_peak_memory_stats()
            there = torch.cuda.memory_allocated()
            options = options | {"batch_size": batch, "temperature": temperature}
            decoded = decode(target, drafter, prompts, **limits, **options)
            speed = decoded.tokens_per_second
            plain = plain or speed
            row = {"case": case, "impl": impl, "tau": decoded.tau, "tokens_per_second": speed}
            row |= {"times_plain": speed / plain, "parameters": parameters(drafter)}
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - there) / 1e6
            rows.append(row)
            told = f"tau {decoded.tau:5.2f}  {speed:8.0f} tokens/s  {speed / plain:5.2f} x plain"
            print(f"  {case:32} {impl:44} {told}", flush=True)
        if temperature == 0:
            speed = generate_speed(model, prompts[:batch], limits["stop_token_ids"], given.generate_tokens)
            row = {"case": case, "impl": "generate of transformers", "tau": 1.0, "tokens_per_second": speed}
            rows.append(row | {"times_plain": speed / plain, "parameters": 0})
            print(f"  {case:32} {row['impl']:44} {speed:8.0f} tokens/s", flush=True)
        print(runner.write(name, rows, {}), flush=True)
    plot(rows, runner.RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
