"""Imports only point down through the layers of the package, and source files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dflash_ext"

# From the top down. Modules that are not named here (native, progress and others) are the base, below all of these.
# The package's own __init__ re-exports the operators, so it stands above them.
LAYERS = (
    "__main__",
    "cli",
    "demo",
    "doctor drafter_doctor",
    "train",
    "eval",
    "data",
    "decode",
    "models",
    "integrations",
    "__init__",
    "ops",
    "reference",
    "masks noise",
)
MOST_LINES = 450
LONG_BY_DESIGN = {"dflash_ext/masks.py"}  # one class, whose constructors belong together


def height(layer: str) -> int:
    """How far up a module or folder directly under the package stands; the base is at 0."""
    above = [i for i, names in enumerate(reversed(LAYERS), 1) if layer in names.split()]
    return above[0] if above else 0


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the layer of every import of this package in a file, imports inside functions included."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = ["dflash_ext", *parents[: len(parents) - node.level + 1]]
            module = package + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [[*node.module.split("."), alias.name] for alias in node.names]
        else:
            continue
        for package, *inside in names:
            if package == "dflash_ext":
                yield node.lineno, layer_of(inside[0]) if inside else "__init__"


def layer_of(name: str) -> str:
    """The layer of what `from dflash_ext import name` gives: a module, or something that __init__ re-exports."""
    is_module = (PACKAGE / name).is_dir() or any(PACKAGE.glob(f"{name}.*"))
    return name if is_module else "__init__"


def upward_imports(path: Path) -> list[str]:
    """The imports of a file that point up, one line each."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return [
        f"{path.relative_to(ROOT)}:{line} imports {layer}"
        for line, layer in imported_layers(path)
        if height(layer) > height(own)
    ]


def test_imports_only_point_down():
    assert [found for path in sorted(PACKAGE.rglob("*.py")) for found in upward_imports(path)] == []


def test_upward_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    for folder in ("ops", "decode", "models"):
        (tmp_path / folder).mkdir()
    (tmp_path / "native.py").touch()
    path = tmp_path / "models" / "target.py"
    path.write_text("from ..native import load\nfrom .taps import Taps\nfrom ..ops import sample\nimport torch\n")
    assert upward_imports(path) == []
    for line in (
        "from ..decode.cache import RowCache",
        "from .. import decode",
        "import dflash_ext.decode",
        "from dflash_ext.decode import decode",
    ):
        path.write_text(f"def late():\n    {line}\n")
        assert upward_imports(path) == ["models/target.py:2 imports decode"]
    path = tmp_path / "ops" / "loss.py"
    path.write_text("from dflash_ext import block_attn\n")
    assert upward_imports(path) == ["ops/loss.py:1 imports __init__"]


def test_source_files_are_short():
    files = [path for folder in ("dflash_ext", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix not in (".md", ".pyc")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert set(long) <= LONG_BY_DESIGN, long
