import io

from rich.console import Console
from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

from dflash_ext import progress


def test_without_a_terminal_lines_tell_the_time_left(monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with progress.progress(Console(file=out), "counting", 8) as advance:
        for note in ("", "", "", "to ten"):
            advance(1, note)
    assert out.getvalue().splitlines() == ["counting: 2 of 8, 33 s left", "counting: 4 of 8, 30 s left, to ten"]


def test_on_a_terminal_there_is_a_bar():
    out = io.StringIO()
    with progress.progress(Console(file=out, force_terminal=True, width=80), "counting", 2) as advance:
        advance(2, "to ten")
    for shown in ("counting", "2/2", "to ten"):
        assert shown in out.getvalue()


def test_numbers_with_their_nouns():
    assert [progress.counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


def test_bars_of_libraries_are_hidden(capsys):
    """Also those of a class that was imported before. A bar that decides for itself, as the hub's do, is shown."""
    with progress.without_library_bars():
        assert list(auto_tqdm(range(3), desc="weights")) == [0, 1, 2]
        assert not capsys.readouterr().err
        list(tqdm(range(3), desc="download", disable=False))
    list(auto_tqdm(range(3), desc="mine"))
    shown = capsys.readouterr().err
    assert "download" in shown and "mine" in shown
