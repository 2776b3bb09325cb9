"""Which cycle decodes: by the drafter, and with a gated LoRA drafter by the number of rows that its one forward has."""

from __future__ import annotations

from os import PathLike

from ..models import Denoiser, DFlashDrafter, LoraDrafter, Target, load_pair
from .canvas.draft import CanvasDraft
from .cycle import Cycle
from .drafts import BlockDraft, GatedDraft, UniformDraft, WholeDraft
from .forward import LeanForward, target_forward
from .forward.adapted import has_large_weights
from .kv_cache import MOST_ROWS, SCRATCH
from .one_forward import OneForwardCycle
from .state import State

Drafter = DFlashDrafter | LoraDrafter | Denoiser


# A forward of so many rows on a GPU costs little more than one of a single row, so that a forward saved is worth more
# than the longer drafts of two forwards, which know the bonus token. docs/lora.md has the measurements of both.
FEW_ROWS, FEW_ROWS_OVER_LARGE_WEIGHTS = 64, 128


def loaded(drafter: Drafter | str | PathLike | None, target: Target) -> Drafter | None:
    """A drafter, or the one in this folder, in the target's dtype and on its device.

    Raises ValueError if there is none, or if it was made for another target.
    """
    return load_pair(target.model, drafter)[1] if isinstance(drafter, str | PathLike) else drafter


def one_forward_rows(width: int, groups: int) -> int:
    """The rows of a cycle of one forward with so many groups of `width` mask rows: the draft's, and those of groups."""
    return width * (1 + groups)


def has_few_rows(target: Target, slots: int, width: int) -> bool:
    """Whether a cycle of one forward has few rows in all slots together, with all of its groups."""
    most = FEW_ROWS_OVER_LARGE_WEIGHTS if has_large_weights(target) else FEW_ROWS
    return slots * one_forward_rows(width, width) <= most


def groups_of(groups: int | None, target: Target, *, slots: int, width: int) -> int:
    """The groups of a cycle of one forward. By default there is one behind every row that verifies if all slots
    together then have few rows, and else only the first one, because rows take time.

    Raises ValueError for a number that is not supported.
    """
    if groups is None:
        return width if has_few_rows(target, slots, width) else 1
    if not 1 <= groups <= width:
        raise ValueError(f"groups is {groups}: 1 to {width} groups are supported with blocks of {width + 1} slots")
    return groups


def forwards_of(
    drafter: Drafter | None, target: Target, forwards: int | None, *, slots: int, width: int, steps: int
) -> int:
    """The forwards of a cycle. By default a gated LoRA drafter has one on a GPU if all slots together have few rows in
    it, and else two, as on a CPU, whose time grows with the rows.

    Raises ValueError for a number that the drafter does not have.
    """
    if forwards not in (None, 1, 2):
        raise ValueError(f"forwards is {forwards}: 1 and 2 are supported")
    if not isinstance(drafter, LoraDrafter):
        if forwards == 1:
            raise ValueError("a cycle of one forward (forwards=1, or groups) needs a gated LoRA drafter")
        return 2
    can = drafter.config.kind == "gated" and width >= 2 and steps == 1
    if forwards == 1:
        drafter.config.check_one_forward()
        if not can:
            raise ValueError("a cycle of one forward takes blocks of 3 slots or more, and one denoising step")
    return forwards or (1 if can and target.device.type == "cuda" and has_few_rows(target, slots, width) else 2)


def make_cycle(
    state: State,
    target: Target,
    drafter: Drafter | None,
    *,
    slots: int,
    max_length: int,
    width: int,
    forwards: int | None,
    groups: int | None,
    exact: bool,
    steps: int,
    greedy: bool,
    lazy: bool,
) -> Cycle:
    """The cycle for a drafter.

    Args:
        slots: those of the caches, the spare one included.
        width: the most drafted tokens of a block.
        lazy: as in `BlockDraft`. Drafters that read tokens themselves always let those of plain cycles wait.

    Raises ValueError for a drafter that the target's forward does not serve.
    """
    if forwards == 2 and groups is not None:
        raise ValueError(f"groups is {groups}: a cycle of two forwards has none")
    forwards = 1 if groups is not None else forwards
    forwards = forwards_of(drafter, target, forwards, slots=slots - 1, width=width, steps=steps)
    is_lora = isinstance(drafter, LoraDrafter)
    groups = groups_of(groups, target, slots=slots - 1, width=width) if forwards == 1 else 0
    rows = one_forward_rows(width, groups) if groups else 0
    sizes = {"slots": slots, "tokens": max_length + max(0, rows - SCRATCH)}
    options = {"width": width, "steps": steps, "greedy": greedy}
    forward = target_forward(target, **sizes, rows=max(rows, MOST_ROWS), exact=exact)
    if not is_lora:
        if drafter is None:
            return Cycle(state, forward, None)
        if isinstance(drafter, Denoiser):
            return Cycle(state, forward, CanvasDraft(drafter, target, **sizes, **options))
        kind = UniformDraft if drafter.config.noise == "uniform" else BlockDraft
        return Cycle(state, forward, kind(drafter, target, **sizes, **options, lazy=lazy))
    drafts = forward
    if drafter.base is not None:
        drafter.base.check_length(max_length, f"rows of {max_length} tokens")
        drafts = target_forward(drafter.base, **sizes, exact=exact)
    if not isinstance(drafts, LeanForward):
        name = type(drafts.target.model).__name__
        raise ValueError(f"LoRA drafters are not supported: the engine has no forward of its own for this {name}")
    if drafter.config.kind == "whole":
        return Cycle(state, forward, WholeDraft(drafter, drafts, **sizes, **options))
    draft = GatedDraft(drafter, forward, **options)
    return OneForwardCycle(state, forward, draft, groups) if forwards == 1 else Cycle(state, forward, draft)
