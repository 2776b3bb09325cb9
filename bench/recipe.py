"""Short trainings of a drafter that each change one thing: ``python -m bench.recipe TARGET ANSWERS FOLDER [NAME ...]``.

Every training takes the same number of steps of the same sequences in the same order, and its learning rate decays to
zero. Then it decodes the same held-out prompts, greedily and at temperature 1. The named trainings (by default all of
them) run one after the other on one GPU; several processes with other names may share FOLDER. A training that is there
is not repeated. ``python -m bench.recipe FOLDER`` compares those that are there in `recipe.json` and `recipe.png`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

from dflash_ext.data import AnswerDataset
from dflash_ext.decode import decode
from dflash_ext.eval import summarize
from dflash_ext.models import Target, load_drafter, load_target
from dflash_ext.train import HeldOutPrompts, Recipe, new_drafter, train_drafter

MASK_TOKEN = 16  # SmolLM2's `<empty_output>`
SHAPE = dict(num_layers=3, intermediate_size=1024, taps=5, initial_layers=None, sample_from_anchor=False)
RECIPE = dict(steps=240, batch_size=32, anchors=64, learning_rate=2e-3, evaluate_prompts=160)
HELD_OUT, LONGEST = 0.01, 512
# What is changed, by a name: arguments of `new_drafter` and of `Recipe`. The widths keep the number of parameters.
CHANGES = {
    "as shipped": {},
    "the last layers": dict(initial_layers=(27, 28, 29)),
    "spread layers": dict(initial_layers=(1, 15, 29)),
    "Muon 2e-3": dict(optimizer="muon"),
    "Muon 5e-3": dict(optimizer="muon", learning_rate=5e-3),
    "the last layers, Muon 2e-3": dict(initial_layers=(27, 28, 29), optimizer="muon"),
    "AdamW 1e-3": dict(learning_rate=1e-3),
    "AdamW 4e-3": dict(learning_rate=4e-3),
    "half KL": dict(loss="kl", teacher_mix=0.5),
    "KL": dict(loss="kl"),
    "half TV": dict(loss="tv", teacher_mix=0.5),
    "decay 7": dict(gamma=7.0),
    "decay 4": dict(gamma=4.0),
    "16 anchors, 128 sequences": dict(anchors=16, batch_size=128),
    "128 anchors, 16 sequences": dict(anchors=128, batch_size=16),
    "packed rows": dict(pack_length=1024),
    "blocks of 8, 8, then 16": dict(block_sizes=(8, 8, 16)),
    "some tokens shown": dict(noise_ratio=0.8),
    "2 layers": dict(num_layers=2, intermediate_size=1792),
    "4 layers": dict(num_layers=4, intermediate_size=640),
    "3 taps": dict(taps=3, intermediate_size=1152),
    "8 taps": dict(taps=8, intermediate_size=832),
    "the last tap alone": dict(taps=(28,), intermediate_size=1280),
    "the first layer alone": dict(taps=(0,), intermediate_size=1280),
    "the anchor's slot drafts": dict(sample_from_anchor=True),
}


def train(target: Target, answers: AnswerDataset, folder: Path, changes: dict) -> None:
    """Trains, decodes the held-out prompts at both temperatures, and writes `result.json`."""
    shape, recipe = (
        base | {name: value for name, value in changes.items() if (name in SHAPE) == (base is SHAPE)}
        for base in (SHAPE, RECIPE)
    )
    recipe = Recipe(**recipe)
    drafter = new_drafter(target, 0, mask_token_id=MASK_TOKEN, **shape)
    tapped = Target(target.model, drafter.config.target_layer_ids)
    trained, held_out = answers.split(HELD_OUT, recipe.seed)
    asked = held_out.prompts()[: recipe.evaluate_prompts]
    limits = {name: answers.header[name] for name in ("max_new_tokens", "stop_token_ids")}
    prompts = HeldOutPrompts(asked, batch_size=recipe.evaluate_prompts, **limits)
    began = time.perf_counter()
    log = train_drafter(drafter, tapped, trained, folder, recipe, held_out=held_out, prompts=prompts)
    seconds = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    last = next(entry for entry in reversed(log) if "eval_tau" in entry)
    drafter = load_drafter(folder, dtype=target.dtype, device=target.device)
    sampled = decode(tapped, drafter, asked, temperature=1.0, batch_size=recipe.evaluate_prompts, **limits)
    result = {
        "changes": changes,
        "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "tau": last["eval_tau"],
        "tau_at_temperature_1": summarize(sampled)["tau"],
        "held_out_loss": last["eval_loss"],
        "acceptance": [last[f"eval_acceptance_{i}"] for i in range(1, 16)],
        "seconds": round(seconds, 1),
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "curve": {entry["step"]: round(entry["tau"], 3) for entry in log if "tau" in entry},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def plot(rows: dict[str, dict], path: Path) -> None:
    """Draws the tau over steps of all trainings, each as the mean of five entries of the log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for name, row in rows.items():
        steps, taus = list(map(int, row["curve"])), list(row["curve"].values())
        means = [fmean(taus[max(0, i - 4) : i + 1]) for i in range(len(taus))]
        axes.plot(steps, means, label=f"{name}: {row['tau']:.2f}", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("teacher-forced tau on training samples")
    axes.legend(title="tau in decoding", fontsize=8)
    figure.savefig(path, dpi=100)


def compare(folder: Path) -> None:
    results = {name: folder / folder_name(name) / "result.json" for name in CHANGES}
    rows = {name: json.loads(path.read_text()) for name, path in results.items() if path.exists()}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["tau"]))
    for name, row in rows.items():
        print(
            f"{name}: tau {row['tau']:.3f}, at temperature 1 {row['tau_at_temperature_1']:.3f}, {row['seconds']:.0f} s"
        )
    shown = {"recipe": RECIPE, "gpu": torch.cuda.is_available() and torch.cuda.get_device_name(), "rows": rows}
    (folder / "recipe.json").write_text(json.dumps(shown, indent=1) + "\n")
    plot(rows, folder / "recipe.png")


def folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def main(target: str, answers: str, output: str, *names: str) -> None:
    model, _ = load_target(target)
    plain = Target(model)
    samples = AnswerDataset(answers, LONGEST, target=plain)
    for name in names or CHANGES:
        folder = Path(output) / folder_name(name)
        if not (folder / "result.json").exists():
            train(plain, samples, folder, CHANGES[name])
            print(name, (folder / "result.json").read_text()[:400], flush=True)


if __name__ == "__main__":
    compare(Path(sys.argv[1])) if len(sys.argv) == 2 else main(*sys.argv[1:])
