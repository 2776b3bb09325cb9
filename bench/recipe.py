"""Short trainings of a drafter that each change one thing.

    python -m bench.recipe BASE TARGET ANSWERS PROMPTS FOLDER [NAME ...]
    python -m bench.recipe FOLDER

BASE is the recipe that is changed: adamw; or muon, by which the drafter that comes with the package was trained; or
long, which takes four times the steps of muon. ANSWERS are the target's answers to PROMPTS, which
`examples/smollm2/prompts.py` collected. All trainings of a base take the same number of steps, and their learning rates
decay to zero. Then they decode the same held-out prompts, greedily and at temperature 1. The named trainings, or all of
them, run one after the other on one GPU; several processes with other names may share FOLDER. A training that is there
is not repeated. The second command compares those that are there in `recipe.json` and `recipe.png`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from dflash_ext.data import AnswerDataset
from dflash_ext.decode import decode
from dflash_ext.eval import summarize
from dflash_ext.models import Target, load_drafter, load_target
from dflash_ext.train import HeldOutPrompts, Recipe, new_drafter, train_drafter

MASK_TOKEN = 16  # SmolLM2's `<empty_output>`
PROMPTS, HELD_OUT, LONGEST = 160, 0.01, 512
# The arguments of `new_drafter` and `Recipe` that all have, but for the base and what is changed.
SHAPE = dict(num_layers=3, intermediate_size=1024, taps=5, sample_from_anchor=False)
RECIPE = dict(steps=240, batch_size=32, anchors=64)
BASES = {
    "adamw": dict(optimizer="adamw", learning_rate=2e-3),
    "muon": (MUON := dict(optimizer="muon", learning_rate=5e-3, loss="kl", teacher_mix=0.5)),
    "long": MUON | dict(steps=960),
}
# Which answers are trained on: those of these temperatures, or those to prompts of these sources.
ANSWERS = dict(temperatures=None, sources=None)
CHATS = ("sharegpt",)
TASKS = ("gsm8k", "code", "facts", "summaries", "mathematics", "translation", "retrieval", "reasoning-gym")
# What is changed, by a name. Widths keep the number of parameters, and batches that of blocks.
CHANGES = {
    "nothing": {},
    "another seed": dict(seed=1),
    "AdamW, 4e-3": dict(optimizer="adamw", learning_rate=4e-3),
    "Muon, 2e-3": dict(optimizer="muon", learning_rate=2e-3),
    "Muon, 5e-3": dict(optimizer="muon", learning_rate=5e-3),
    "Muon, 1e-2": dict(optimizer="muon", learning_rate=1e-2),
    "cross-entropy alone": dict(loss="ce", teacher_mix=1.0),
    "half KL": dict(loss="kl", teacher_mix=0.5),
    "KL alone": dict(loss="kl", teacher_mix=1.0),
    "half TV": dict(loss="tv", teacher_mix=0.5),
    "decay 7": dict(gamma=7.0),
    "16 anchors, 128 sequences": dict(anchors=16, batch_size=128),
    "packed rows": dict(pack_length=1024),
    "blocks of 8, 8, then 16": dict(block_sizes=(8, 8, 16)),
    "some tokens shown": dict(noise_ratio=0.8),
    "2 layers": dict(num_layers=2, intermediate_size=1792),
    "4 layers": dict(num_layers=4, intermediate_size=640),
    "3 taps": dict(taps=3, intermediate_size=1152),
    "8 taps": dict(taps=8, intermediate_size=832),
    "the first layer alone": dict(taps=(0,), intermediate_size=1280),
    "the anchor's slot drafts": dict(sample_from_anchor=True),
    "greedy answers alone": dict(temperatures=(0.0,)),
    "sampled answers alone": dict(temperatures=(1.0,)),
    "chats alone": dict(sources=CHATS),
    "tasks alone": dict(sources=TASKS),
}


def train(target: Target, answers: Path, prompts: Path, folder: Path, base: str, changes: dict) -> None:
    """Trains, decodes the held-out prompts at both temperatures, and writes `result.json`."""
    shape = {name: changes.get(name, value) for name, value in SHAPE.items()}
    chosen = {name: changes.get(name, value) for name, value in ANSWERS.items()}
    changed = {name: value for name, value in changes.items() if name not in (*SHAPE, *ANSWERS)}
    recipe = Recipe(**RECIPE | BASES[base] | changed)
    trained, held_out = split(target, answers, prompts, **chosen)
    asked = held_out.prompts()[:PROMPTS]
    limits = {name: held_out.header[name] for name in ("max_new_tokens", "stop_token_ids")}
    drafter = new_drafter(target, recipe.seed, mask_token_id=MASK_TOKEN, **shape)
    tapped = Target(target.model, drafter.config.target_layer_ids)
    decoded = HeldOutPrompts(asked, batch_size=PROMPTS, **limits)
    log = train_drafter(drafter, tapped, trained, folder, recipe, held_out=held_out, prompts=decoded)
    last = next(entry for entry in reversed(log) if "eval_tau" in entry)
    drafter = load_drafter(folder, dtype=target.dtype, device=target.device)
    sampled = decode(tapped, drafter, asked, temperature=1.0, batch_size=PROMPTS, **limits)
    result = {
        "base": base,
        "changes": changes,
        "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "tau": last["eval_tau"],
        "tau at temperature 1": summarize(sampled)["tau"],
        "acceptance": [last[f"eval_acceptance_{i}"] for i in range(1, drafter.config.block_size)],
        "seconds": next(entry["train_runtime"] for entry in log if "train_runtime" in entry),
        "curve": {entry["step"]: entry["tau"] for entry in log if "tau" in entry},
    }
    (folder / "result.json").write_text(json.dumps(result) + "\n")


@functools.cache
def split(
    target: Target,
    answers: Path,
    prompts: Path,
    temperatures: tuple[float, ...] | None,
    sources: tuple[str, ...] | None,
) -> tuple[AnswerDataset, AnswerDataset]:
    """What is trained on, and what is held out, which is the same whatever is trained on."""
    if (temperatures, sources) == (None, None):
        return AnswerDataset(answers, LONGEST, target=target).split(HELD_OUT)
    _, held_out = split(target, answers, prompts, None, None)
    asked = set(map(tuple, held_out.prompts()))
    source_of = [json.loads(line)["source"] for line in prompts.open()]
    with answers.open() as lines, tempfile.NamedTemporaryFile("w") as file:
        file.write(next(lines))
        for line in lines:
            row = json.loads(line)
            is_chosen = temperatures is None or row["temperature"] in temperatures
            is_chosen = is_chosen and (sources is None or source_of[row["index"]] in sources)
            if is_chosen and tuple(row["prompt_ids"]) not in asked:
                file.write(line)
        file.flush()
        return AnswerDataset(file.name, LONGEST, target=target), held_out


def compare(folder: Path) -> None:
    """Prints and draws what is there, the best first."""
    results = {name: folder / folder_name(name) / "result.json" for name in CHANGES}
    rows = {name: json.loads(path.read_text()) for name, path in results.items() if path.exists()}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["tau"]))
    for name, row in rows.items():
        print(f"{name}: tau {row['tau']:.2f}, at temperature 1 {row['tau at temperature 1']:.2f}")
    (base,) = {row.pop("base") for row in rows.values()}
    facts = {"shape": SHAPE, "recipe": RECIPE | BASES[base], "rows": rows}
    (folder / "recipe.json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(rows, folder / "recipe.png")


def plot(rows: dict[str, dict], path: Path) -> None:
    """Draws the tau over steps of all trainings, each as the mean of five entries of the log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for name, row in rows.items():
        steps, taus = list(map(int, row["curve"])), list(row["curve"].values())
        means = [fmean(taus[max(0, i - 4) : i + 1]) for i in range(len(taus))]
        axes.plot(steps, means, label=f"{name}: {row['tau']:.2f}", linewidth=2.5 if not row["changes"] else 1)
    axes.set_xlabel("step")
    axes.set_ylabel("teacher-forced tau on training samples")
    axes.legend(title="tau in decoding", fontsize=8)
    figure.savefig(path, dpi=100)


def folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def main(base: str, target: str, answers: str, prompts: str, output: str, *names: str) -> None:
    plain = Target(load_target(target)[0])
    for name in names or CHANGES:
        folder = Path(output) / folder_name(name)
        if not (folder / "result.json").exists():
            train(plain, Path(answers), Path(prompts), folder, base, CHANGES[name])
            print(name, (folder / "result.json").read_text(), flush=True)


if __name__ == "__main__":
    compare(Path(sys.argv[1])) if len(sys.argv) == 2 else main(*sys.argv[1:])
