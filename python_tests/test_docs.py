"""The README and the guides name files, options, targets of make and environment variables that exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from dflash_ext.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [ROOT / "setup.py", *(ROOT / "dflash_ext").rglob("*.py"), *(ROOT / "csrc").rglob("*.[hc]*")]
OTHER_PROGRAMS = {"--no-deps", "--no-build-isolation", "--nproc-per-node", "--module"}  # options of pip and torchrun

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def options_of(command) -> set[str]:
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


@page
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@page
def test_options_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()))
    assert named - OTHER_PROGRAMS - {"--help"} <= options_of(get_command(app))


@page
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for names in targets for name in names.split()}
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M)) <= targets


@page
def test_environment_variables_exist(page):
    sources = "".join(path.read_text() for path in SOURCES)
    for name in set(re.findall(r"DFLASH_EXT_[A-Z_]+", page.read_text())):
        assert name in sources, name


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
