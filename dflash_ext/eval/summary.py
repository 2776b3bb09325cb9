"""The summary of a decoding run: a dict of numbers, and a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table

from ..decode import Decoded

_CAPTION = """tau: tokens committed per cycle, bonus included, as the mean over prompts
ms: drafting, verifying and committing in a cycle of the whole batch
accepted: of the cycles that verified a position, the share that accepted its token (0 if no cycle verified it)"""


def summarize(decoded: Decoded) -> dict:
    """The run's numbers, ready for JSON.

    `tau` is the number of tokens committed per cycle, bonus included: the mean over prompts of each prompt's mean over
    its cycles (arXiv 2602.06036). `tokens_per_cycle` is the mean over all cycles of all prompts, as `acceptance` is.
    Times are in milliseconds per cycle of a whole batch. With the block size "auto", `costs` has the seconds of a cycle
    by its number of rows and of drafted tokens.
    """
    parts = {name: getattr(decoded, f"{name}_seconds") for name in ("draft", "verify", "commit")}
    costs = {"costs": decoded.costs} if decoded.costs else {}
    return costs | {
        "prompts": len(decoded.completions),
        "tokens": sum(len(c.tokens) for c in decoded.completions),
        "tau": round(decoded.tau, 4),
        "tokens_per_cycle": round(decoded.tokens_per_cycle, 4),
        "acceptance": [round(share, 4) for share in decoded.acceptance],
        "tokens_per_second": round(decoded.tokens_per_second, 1),
        **{f"{name}_ms": round(1e3 * seconds / max(decoded.cycles, 1), 3) for name, seconds in parts.items()},
    }


def table(results: dict[str, Decoded], *, title: str | None = None) -> Table:
    """A table with one row per named run. Its caption explains the columns, if one of the runs drafted."""
    caption = _CAPTION if any(decoded.acceptance for decoded in results.values()) else None
    view = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE)
    view.add_column("")
    for column in ("prompts", "tau", "tokens/s", "ms"):
        view.add_column(column, justify="right", no_wrap=True)
    view.add_column("accepted, %", min_width=11)
    for name, decoded in results.items():
        row = summarize(decoded)
        accepted = " ".join(f"{100 * share:.0f}" for share in row["acceptance"]) or "-"
        times = "+".join(f"{row[key]:.1f}" for key in ("draft_ms", "verify_ms", "commit_ms"))
        view.add_row(name, str(row["prompts"]), f"{row['tau']:.2f}", f"{row['tokens_per_second']:.1f}", times, accepted)
    return view
