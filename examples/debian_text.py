"""Makes a corpus for `dflash-ext adapt` from unpacked Debian packages: `debian_text.py OUTPUT FOLDER...`.

    apt-get download anarchism python3.11-doc dict-gcide postgresql-doc-15 dict-foldoc
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python examples/debian_text.py corpus unpacked

It reads the pages of documentation and books (.html, .rst.txt) and dictionaries (.dict.dz). Every page, and every run
of entries of a dictionary, is a document. OUTPUT/train.jsonl.xz and OUTPUT/held_out.jsonl.xz hold them: which of the
two follows from the text, so that a document that is in two packages is in one of them.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

HELD_OUT = 32  # one document of so many
ENTRIES = 8_000  # characters of a dictionary that make a document
SHORTEST = 400  # characters of a document that is worth reading
SKIPPED = {"script", "style", "head", "nav"}
BREAKS = {"p", "div", "br", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "table", "ul", "ol"}


class Page(HTMLParser):
    """Collects the text of an HTML page."""

    def __init__(self):
        super().__init__()
        self.text: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.skipping += tag in SKIPPED
        if tag in BREAKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in SKIPPED
        if tag in BREAKS:
            self.text.append("\n")

    def handle_data(self, data: str) -> None:
        if self.skipping <= 0:
            self.text.append(data)


def documents(folder: Path) -> Iterator[str]:
    """The documents of a folder, in the order of their files' names."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name.endswith(".html"):
            page = Page()
            page.feed(path.read_text(errors="replace"))
            yield "".join(page.text)
        elif path.name.endswith(".rst.txt"):
            yield path.read_text(errors="replace")
        elif path.name.endswith(".dict.dz"):  # a gzip file that can also be read from the middle
            text = gzip.decompress(path.read_bytes()).decode(errors="replace")
            yield from (text[at : at + ENTRIES] for at in range(0, len(text), ENTRIES))


def main(output: Path, folders: list[Path]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    found: dict[int, str] = {}
    for folder in folders:
        for document in documents(folder):
            text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", document)).strip()
            if len(text) >= SHORTEST:
                found[zlib.crc32(text.encode())] = text
    # In the order of their hashes, so that the first rows of a file are of all packages.
    parts = {"train": lambda number: number % HELD_OUT, "held_out": lambda number: not number % HELD_OUT}
    for name, is_in in parts.items():
        texts = [found[number] for number in sorted(found) if is_in(number)]
        path = output / f"{name}.jsonl.xz"
        with lzma.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        print(f"{path}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
