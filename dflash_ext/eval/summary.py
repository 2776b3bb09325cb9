"""The summary of a decoding run: a dict of numbers, and a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from ..decode import Decoded


def summarize(decoded: Decoded) -> dict:
    """The run's numbers, ready for JSON.

    `tau` is the number of tokens committed per cycle, bonus included: the mean over prompts of each prompt's mean over
    its cycles (arXiv 2602.06036). `acceptance` and the times are taken over all cycles of the run. Times are in
    milliseconds per cycle of a whole batch. With the block size "auto", `costs` has the seconds of a cycle by its
    number of rows and of drafted tokens.
    """
    costs = {"costs": decoded.costs} if decoded.costs else {}
    return costs | {
        "prompts": len(decoded.completions),
        "tokens": sum(len(c.tokens) for c in decoded.completions),
        "tau": round(decoded.tau, 4),
        "acceptance": [round(share, 4) for share in decoded.acceptance],
        "tokens_per_second": round(decoded.tokens_per_second, 1),
        "draft_ms": round(1e3 * decoded.draft_seconds / max(decoded.cycles, 1), 3),
        "verify_ms": round(1e3 * decoded.verify_seconds / max(decoded.cycles, 1), 3),
    }


def table(results: dict[str, Decoded], *, title: str | None = None) -> Table:
    """A table with one row per named run."""
    view = Table(
        title=title,
        caption="tau: tokens committed per cycle, bonus included, as the mean over prompts\n"
        "accepted: the share of all cycles that accepted the drafted token",
        caption_justify="left",
    )
    view.add_column("")
    for column in ("prompts", "tau", "tokens/s", "draft ms", "verify ms", "accepted by position, %"):
        view.add_column(column, justify="right" if column != "accepted by position, %" else "left")
    for name, decoded in results.items():
        row = summarize(decoded)
        accepted = " ".join(f"{100 * share:.0f}" for share in row["acceptance"]) or "-"
        view.add_row(
            name,
            str(row["prompts"]),
            f"{row['tau']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['draft_ms']:.1f}",
            f"{row['verify_ms']:.1f}",
            accepted,
        )
    return view
