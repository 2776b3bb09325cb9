import pytest

from dflash_ext.demo import tiny

FILES = 12


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few steps, and a few small files in the place of the standard library. Returns how many."""
    for index in range(FILES):
        lines = (f"def function_{index}_{line}(argument):\n    return argument + {line}\n" for line in range(80))
        (tmp_path / f"file_{index:02}.py").write_text(f"# file {index}\n" + "".join(lines))
    monkeypatch.setattr(tiny.sysconfig, "get_path", lambda _: str(tmp_path))
    for name, value in {"TARGET_STEPS": 3, "DRAFTER_STEPS": 3, "ANSWERS": 8, "ANSWER_TOKENS": 16}.items():
        monkeypatch.setattr(tiny, name, value)
    return FILES
