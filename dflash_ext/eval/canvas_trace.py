"""A page that shows canvases step by step: what each step accepted, what it drew anew, and what was final."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from ..decode.canvas import CanvasCompletion, Step
from .trace import page_of

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { font-size: 1em; margin: 2.5em 0 0.5em; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; color: #777; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; width: 100%; }
th { font-weight: normal; color: #777; text-align: right; vertical-align: top; padding-right: 0.8em; width: 3em; }
td { white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px solid #eee; }
.final { background: #cdeccb; } .accepted { background: #ffe0b8; } .open { color: #aaa; }
"""
_LEGEND = (
    'A row is a denoising step, and the last one is what was committed. <span class="final">Green</span>: the step '
    'accepted this token, or an earlier one did and kept it, and it is the final one. <span class="accepted">Orange'
    '</span>: accepted, but replaced later. <span class="open">Grey</span>: still open; the likeliest token, or _ for '
    "a masked position. In uniform-state diffusion the next step reads a random token there."
)


def canvas_trace_page(
    answers: Sequence[tuple[str, str, CanvasCompletion]],
    detokenize: Callable[[list[int]], str],
    *,
    title: str,
    mask_id: int | None = None,
) -> str:
    """One self-contained HTML page.

    Args:
        answers: the name, the prompt's text and the completion of each answer, which was traced.
        detokenize: the text of tokens.
        mask_id: the mask token of masked diffusion.
    """

    def text(token: int) -> str:
        return "_" if token == mask_id else detokenize([token])

    parts = [_answer(name, prompt, completion, text, mask_id) for name, prompt, completion in answers]
    return page_of(parts, title=title, style=_STYLE, legend=_LEGEND)


def _answer(
    name: str, prompt: str, completion: CanvasCompletion, text: Callable[[int], str], mask_id: int | None
) -> str:
    heading = (
        f"{name}: {len(completion.tokens)} tokens in {sum(completion.steps)} steps, ended by {completion.finish_reason}"
    )
    tables = "\n".join(_canvas(steps, text, mask_id) for steps in completion.canvases if steps)
    return f'<h2>{escape(heading)}</h2>\n<div class="prompt">{escape(prompt)}</div>\n{tables}'


def _canvas(steps: Sequence[Step], text: Callable[[int], str], mask_id: int | None) -> str:
    final = steps[-1].best
    rows = []
    for number, step in enumerate(steps, 1):
        # In masked diffusion a token stays once it is accepted, so that all that is not masked has been accepted.
        settled = step.accepted if mask_id is None else [token != mask_id for token in step.canvas]
        tokens = [
            kept if is_settled else best for is_settled, kept, best in zip(settled, step.canvas, step.best, strict=True)
        ]
        kinds = [
            "open" if not is_settled else "final" if token == last else "accepted"
            for is_settled, token, last in zip(settled, tokens, final, strict=True)
        ]
        spans = "".join(
            f'<span class="{kind}">{escape(text(token))}</span>' for kind, token in zip(kinds, tokens, strict=True)
        )
        rows.append(f"<tr><th>{number}</th><td>{spans}</td></tr>")
    committed = "".join(escape(text(token)) for token in final)
    rows.append(f'<tr><th>=</th><td class="committed">{committed}</td></tr>')
    return "<table>\n" + "\n".join(rows) + "\n</table>"
