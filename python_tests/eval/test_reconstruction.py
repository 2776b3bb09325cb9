import io
import json

import pytest
import torch
from rich.console import Console

from dflash_ext.data import NoiseCollator
from dflash_ext.eval.reconstruction import (
    Reconstruction,
    _spans,
    figures,
    plot_reconstruction,
    reconstruct,
    table,
)
from dflash_ext.noise import MaskNoise, Share
from python_tests.models.test_adaptation import adaptation_of
from python_tests.train.test_denoisers import text

RATES = (0.25, 0.5)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
@pytest.mark.parametrize("pattern", ["causal", "prefix_block", "block_causal"])
def test_figures_are_those_of_full_logits(family, pattern):
    size = 4 if pattern == "block_causal" else None
    adaptation, rows = adaptation_of(family, pattern=pattern, block_size=size), text().first(5)
    found = reconstruct(adaptation, rows, RATES, span=2, batch_size=2, seed=3)
    for rate in RATES:
        collator = NoiseCollator(MaskNoise(Share(rate, rate), 2), block_size=size)
        batch = collator([{**rows[row], "key": (3, f"rate {rate}", row)} for row in range(5)])
        with torch.no_grad():
            states = adaptation(*adaptation.inputs(batch))[:, :32]
        logits = states @ adaptation.target.head.T
        hidden, ids = batch["hidden"], batch["input_ids"]
        softcap = adaptation.target.softcap
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")[hidden].mean()
        accuracy = (logits.argmax(-1) == ids)[hidden].float().mean()
        assert found[rate].interval("nll").mean == pytest.approx(float(nll), rel=1e-4)
        assert found[rate].interval("accuracy").mean == pytest.approx(float(accuracy), rel=1e-4)


def test_spans():
    hidden = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 1], [0] * 8]).bool()
    starts = torch.tensor([[0, 0, 0, 0, 0, 5, 5, 5], [0] * 8, [0] * 8])  # a document starts inside of a run
    right = torch.tensor([[0, 1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8]).bool()
    assert _spans(right, hidden, starts).tolist() == [[2, 3], [1, 2], [0, 0]]


def of(accuracy, rows=50):
    right = torch.bernoulli(torch.full((rows,), accuracy), generator=torch.Generator().manual_seed(0)) * 10
    pairs = torch.stack([right, torch.full((rows,), 10.0)], dim=1).double()
    return Reconstruction(dict.fromkeys(("accuracy", "nll", "spans"), pairs))


def test_differences_are_paired():
    """The rows are as hard for both, so that their difference is more certain than either figure."""
    base, better = of(0.4), of(0.4)
    better.sums["accuracy"] = base.sums["accuracy"] + torch.tensor([1.0, 0.0])
    absolute, relative = better.difference(base, "accuracy")
    assert absolute.mean == pytest.approx(0.1) and absolute.high - absolute.low < 1e-9
    assert relative.mean == pytest.approx(0.1 / base.interval("accuracy").mean)
    one = base.interval("accuracy")
    assert one.low < one.mean < one.high and one.high - one.low > 0.1


def test_what_is_shown(tmp_path):
    results = {"L1": {0.125: of(0.0), 0.15: of(0.3), 0.5: of(0.2)}, "L2": {0.125: of(0.1), 0.15: of(0.6), 0.5: of(0.4)}}
    told = json.loads(json.dumps(figures(results), allow_nan=False))
    assert told["L2"]["0.125"]["accuracy"]["relative"]["mean"] is None  # more than nothing
    assert set(told["L2"]["0.15"]["accuracy"]) == {"mean", "low", "high", "absolute", "relative"}
    assert set(told["L1"]["0.5"]["nll"]) == {"mean", "low", "high"}
    assert table(results).row_count == 6 and list(table(results).columns[0].cells)[::2] == ["12.5%", "15%", "50%"]
    results = {"L1_of_2000": results["L1"], "L2_of_2000": results["L2"]}
    out = io.StringIO()
    Console(file=out, width=80).print(table(results))
    shown = [line for line in out.getvalue().splitlines() if "L1_of_2000" in line or "L2_of_2000" in line]
    assert [line.count("±") for line in shown] == [3, 4, 3, 5, 3, 5] and "nan" not in out.getvalue()
    plot_reconstruction(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
