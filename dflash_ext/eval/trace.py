"""A page that shows how answers came about: the text coloured by cycle, and what each cycle drafted and rejected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from ..decode import Completion

_STYLE = """
body { font: 16px/1.7 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { font-size: 1em; margin: 2.5em 0 0.5em; }
.prompt, .answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #777; }
.cycle { border-radius: 3px; padding: 1px 0; cursor: help; }
.cycle:hover { outline: 2px solid #555; }
.own { border-bottom: 2px solid #555; }
.first { background: #e8e8e8; } .c0 { background: #cfe3ff; } .c1 { background: #ffe0b8; } .c2 { background: #cdeccb; }
.c3 { background: #eed4f5; }
"""
_CONTEXT = 8  # rejected tokens may go on with a character that began at most so many tokens before
_LEGEND = (
    "Each colour is a cycle. Underlined is the token that the target itself has added to the accepted draft. Point at "
    "a cycle to see what was drafted and rejected."
)


def trace_page(
    answers: Sequence[tuple[str, str, Completion]], detokenize: Callable[[list[int]], str], *, title: str
) -> str:
    """One self-contained HTML page.

    Args:
        answers: the name, the prompt's text and the completion of each answer.
        detokenize: the text of tokens.
    """
    parts = [_answer(name, prompt, completion, detokenize) for name, prompt, completion in answers]
    return page_of(parts, title=title, style=_STYLE, legend=_LEGEND)


def page_of(parts: Sequence[str], *, title: str, style: str, legend: str) -> str:
    """A self-contained HTML page. The parts and the legend are HTML, the title is text."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{legend}</p>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _answer(name: str, prompt: str, completion: Completion, detokenize: Callable[[list[int]], str]) -> str:
    tokens = completion.tokens
    heading = f"{name}: {len(tokens)} tokens, tau {completion.tau:.2f}, ended by {completion.finish_reason}"
    # Where the accepted tokens of each cycle end, and where the cycle does. A stop token may cut an accepted draft.
    cuts = [0, 1]
    for committed, accepted in zip(completion.committed, completion.accepted, strict=True):
        cuts += [cuts[-1] + min(accepted, committed), cuts[-1] + committed]
    texts = _pieces(tokens, cuts, detokenize)
    spans = [f'<span class="cycle first" title="by the prompt alone">{escape(texts[0])}</span>']
    drafts = zip(completion.accepted, completion.drafted, cuts[2::2], texts[1::2], texts[2::2], strict=True)
    for number, (accepted, drafted, end, kept, own) in enumerate(drafts, 1):
        told = f"cycle {number}: {f'{accepted} of {len(drafted)} drafted tokens accepted' if drafted else 'no draft'}"
        if rejected := drafted[accepted:]:
            before = tokens[max(0, end - _CONTEXT) : end]
            _, text = _pieces([*before, *rejected], [0, len(before), len(before) + len(rejected)], detokenize)
            told += f", rejected: {text}"
        spans.append(
            f'<span class="cycle c{number % 4}" title="{escape(told)}">{escape(kept)}'
            f'<span class="own">{escape(own)}</span></span>'
        )
    return (
        f'<h2>{escape(heading)}</h2>\n<div class="prompt">{escape(prompt)}</div>\n'
        f'<div class="answer">{"".join(spans)}</div>'
    )


def _pieces(tokens: list[int], cuts: list[int], detokenize: Callable[[list[int]], str]) -> list[str]:
    """The text between each two cuts. A token may be half a character, which then stands where it is complete."""
    texts = [detokenize(tokens[:cut]).rstrip("\ufffd") for cut in cuts[:-1]] + [detokenize(tokens)]
    return [after[len(before) :] for before, after in pairwise(texts)]
