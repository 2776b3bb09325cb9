import gc
import sys
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    """The collector passes over what has been imported: half a million objects, a third of a second each time.

    Accelerate collects after every training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Trainings leave an empty file where they would draw a curve, which takes longer than the steps of most tests."""
    if run := sys.modules.get("dflash_ext.train.run"):
        monkeypatch.setattr(run, "plot_curve", lambda log, path, meter: Path(path).touch())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and, where there is one, on the GPU."""
    return request.param
