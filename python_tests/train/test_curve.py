from matplotlib import pyplot

from dflash_ext.train import plot_curve


def test_the_plot_shows_the_loss_the_tau_and_the_evaluations(tmp_path, monkeypatch):
    shown = {}

    def keep(figure):
        for axes in figure.axes:
            shown[axes.get_ylabel()] = [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]

    monkeypatch.setattr(pyplot, "close", keep)
    log = [
        {"step": 1, "loss": 4.0, "tau": 1.0},
        {"step": 2, "loss": 2.0, "tau": 2.0},
        {"step": 2, "eval_loss": 3.0, "eval_tau": 1.5},
        {"step": 3, "train_loss": 3.0},
    ]
    plot_curve(log, tmp_path / "curve.png")
    loss, tau = shown["loss"], shown["tau on training samples"]
    assert loss == [[(1, 4.0), (2, 2.0)], [(1, 4.0), (2, 3.0)]]  # the values, and their running mean
    assert tau == [[(1, 1.0), (2, 2.0)], [(1, 1.0), (2, 1.5)], [(2, 1.5)]]
    assert (tmp_path / "curve.png").stat().st_size
