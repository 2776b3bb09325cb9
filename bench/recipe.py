"""Short trainings of a drafter that each change one thing: ``python -m bench.recipe TARGET ANSWERS FOLDER``.

Each runs `dflash-ext train` with the shapes of the drafter that comes with the package, on the same sequences in the
same order, several at a time on one GPU. FOLDER gets a folder for each, and `recipe.json` and `recipe.png` with their
figures and curves. A training that is there is not repeated. One that was interrupted counts as far as it came, because
all are compared at the same steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

AT_A_TIME = 7
COMMON = "--layers 3 --intermediate-size 1024 --steps 300 --batch-size 32 --anchors 64 --learning-rate 2e-3"
COMMON += " --max-length 512 --held-out 0.01 --evaluate-prompts 32 --mask-token 16"
# What is changed, by a name. The sizes keep the number of parameters.
CHANGES = {
    "as shipped": "",
    "Muon": "--optimizer muon",
    "Muon, rate 5e-3": "--optimizer muon --learning-rate 5e-3",
    "AdamW, rate 4e-3": "--learning-rate 4e-3",
    "half KL": "--loss kl --teacher-mix 0.5",
    "KL": "--loss kl",
    "half TV": "--loss tv --teacher-mix 0.5",
    "decay 7": "--gamma 7",
    "16 anchors": "--anchors 16",
    "128 anchors, half the batch": "--anchors 128 --batch-size 16",
    "2 layers": "--layers 2 --intermediate-size 1792",
    "4 layers": "--layers 4 --intermediate-size 640",
    "3 taps": "--taps 3",
    "8 taps": "--taps 8 --intermediate-size 832",
    "some tokens shown": "--noise-ratio 0.8",
    "blocks of 4, 8, 16 in turn": "--curriculum 4,8,16",
    "taps of the first layers": "--taps 0,1",
    "the anchor's slot drafts": "--sample-from-anchor",
}


def train(target: str, answers: str, folder: Path, options: str) -> None:
    """Runs the command, and keeps what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dflash_ext", "train", "--target", target, "--answers", answers]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        words = [*COMMON.split(), *options.split(), "--output", str(folder)]
        subprocess.run([*command, *words], stdout=log, stderr=subprocess.STDOUT, check=True)


def curve_of(folder: Path) -> dict[int, float]:
    """The teacher-forced tau of a training by its steps."""
    log = json.loads((folder / "training.json").read_text())["log"]
    return {entry["step"]: entry["tau"] for entry in log if "tau" in entry}


def compare(curves: dict[str, dict[int, float]]) -> dict[str, dict]:
    """The mean tau of each training over the last fifty steps that it has in common with the first one, and how much
    it is above the first one's there."""
    first = next(iter(curves.values()))
    rows = {}
    for name, curve in curves.items():
        end = max(first.keys() & curve.keys())
        steps = [step for step in first.keys() & curve.keys() if step > end - 50]
        tau, of_first = (fmean(each[step] for step in steps) for each in (curve, first))
        rows[name] = {"options": CHANGES[name], "step": end, "tau": tau, "gain": tau - of_first, "curve": curve}
    return rows


def plot(rows: dict[str, dict], path: Path) -> None:
    """Draws the tau over steps of all trainings, each as the mean of five entries of the log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["gain"]):
        steps, taus = zip(*row["curve"].items(), strict=True)
        means = [fmean(taus[max(0, i - 4) : i + 1]) for i in range(len(taus))]
        axes.plot(steps, means, label=f"{name}: {row['gain']:+.2f}", linewidth=2.5 if row["gain"] == 0 else 1)
    axes.set_xlabel("step")
    axes.set_ylabel("teacher-forced tau on training samples")
    axes.legend(title="difference at the same steps", fontsize=8)
    figure.savefig(path, dpi=100)


def main(target: str, answers: str, output: str) -> None:
    folders = {name: Path(output) / name.replace(" ", "-").replace(",", "") for name in CHANGES}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        missing = [name for name, folder in folders.items() if not (folder / "training.json").exists()]
        for _ in pool.map(lambda name: train(target, answers, folders[name], CHANGES[name]), missing):
            pass
    rows = compare({name: curve_of(folder) for name, folder in folders.items()})
    for name, row in rows.items():
        print(f"{name}: tau {row['tau']:.3f} at step {row['step']}, {row['gain']:+.3f}")
    (Path(output) / "recipe.json").write_text(json.dumps({"common": COMMON, "rows": rows}, indent=1) + "\n")
    plot(rows, Path(output) / "recipe.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
