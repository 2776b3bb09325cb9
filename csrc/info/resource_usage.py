"""What ptxas says about every kernel, kept at build time so that no GPU is needed to read it.

    resource_usage.py compile <nvcc command>       run nvcc; keep ptxas' report beside the object
    resource_usage.py table <table> <object>...    write the reports of these objects as C++ initialisers

`compile` is the compiler launcher of the CUDA sources. It fails on serialised wgmma too, which ptxas only mentions.
"""

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SERIALISED = re.compile(r"wgmma.*serializ", re.IGNORECASE)


def report_of(obj: str) -> Path:
    return Path(obj + ".ptxas")


def compile_and_keep(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    loud = [line for line in done.stderr.splitlines() if not re.match(r"ptxas info|\s+\d+ bytes stack frame", line)]
    serialised = [line for line in done.stderr.splitlines() if SERIALISED.search(line)]
    print(*loud, *serialised, sep="\n", end="\n" if loud or serialised else "", file=sys.stderr)
    if "-o" in command and "-c" in command:
        report_of(command[command.index("-o") + 1]).write_text(done.stderr)
    return done.returncode or (1 if serialised else 0)


def write_table(table: Path, objects: list[str]) -> None:
    rows = []
    for obj in objects:
        for entry in ENTRY.finditer(report_of(obj).read_text()):
            shared = re.search(r"(\d+) bytes smem", entry["rest"])
            rows.append(
                f'{{"{entry["name"]}", "{entry["arch"]}", {entry["registers"]}, {shared[1] if shared else 0}, '
                f"{entry['stack']}, {int(entry['stores']) + int(entry['loads'])}}},\n"
            )
    table.write_text("".join(sorted(rows)))


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    if mode == "compile":
        sys.exit(compile_and_keep(arguments))
    write_table(Path(arguments[0]), arguments[1:])
