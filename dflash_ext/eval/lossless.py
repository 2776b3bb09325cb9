"""Whether a drafter leaves a target's output as it is, over a user's own prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..decode import Drafter, decode
from ..models import Target

# Chi-square statistics of fair draws, as standard deviations, are beyond this about once in 10^5 prompts.
LARGEST_Z = 4.26
DRAFTING = ("block_size", "forwards", "groups")  # options of `decode` that need a drafter


@dataclass(frozen=True)
class Divergence:
    """The first token in which a prompt's speculative output differs from its plain output.

    regret: how much less likely the speculative token is than the likeliest one, in nats, under the target's own
        modules. It is 0 for a tie that rounding decides in one way or the other.
    """

    prompt: int
    position: int
    plain: int
    speculative: int
    regret: float


def greedy_divergences(
    target: Target, drafter: Drafter, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options
) -> list[Divergence]:
    """Decodes prompts plainly and speculatively, and finds where the outputs part. `options` are those of `decode`."""
    plain, speculative = (
        decode(target, draft, prompts, max_new_tokens=max_new_tokens, **given)
        for draft, given in ((None, {k: v for k, v in options.items() if k not in DRAFTING}), (drafter, options))
    )
    found = []
    for index, (one, other) in enumerate(zip(plain.completions, speculative.completions, strict=True)):
        if one.tokens == other.tokens:
            continue
        pairs = zip(one.tokens, other.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.tokens), len(other.tokens)) - 1)
        before = [*prompts[index], *one.tokens[:at]]
        logp = _log_probabilities(target, [before])[0]
        regret = (logp.max() - logp[other.tokens[at]]).item()
        found.append(Divergence(index, at, one.tokens[at], other.tokens[at], regret))
    return found


def sampling_z(
    target: Target,
    drafter: Drafter,
    prompt: Sequence[int],
    *,
    draws: int,
    temperature: float,
    **options,
) -> float | None:
    """How far the second tokens of many sampled answers are from the target's own distribution.

    The second token is the first one that a draft has proposed. Its distribution given the first token is computed by
    the target's own modules. Tokens that are expected in few draws are pooled. `options` are those of `decode`.

    Returns:
        A chi-square statistic as standard deviations (Wilson and Hilferty's approximation): fair draws stay below
        LARGEST_Z, but for one prompt in about 10^5. None if no token is expected in 5 draws, or only one is.
    """
    decoded = decode(target, drafter, [prompt] * draws, max_new_tokens=3, temperature=temperature, **options)
    pairs = Counter(tuple(completion.tokens[:2]) for completion in decoded.completions)
    firsts = Counter(first for first, _ in pairs.elements())
    statistic, freedom = 0.0, 0
    for first, count in firsts.items():
        expected = count * (_log_probabilities(target, [[*prompt, first]], temperature)[0].exp())
        often = expected >= 5
        observed = torch.zeros_like(expected)
        for (one, second), times in pairs.items():
            if one == first:
                observed[second] += times
        rest = torch.stack([observed[~often].sum(), expected[~often].sum()])
        cells = torch.stack([observed[often], expected[often]])
        if rest[1] >= 5 or cells.shape[1] == 0:
            cells = torch.cat([cells, rest[:, None]], dim=1)
        else:
            cells[:, cells[1].argmin()] += rest
        statistic += ((cells[0] - cells[1]).square() / cells[1]).sum().item()
        freedom += cells.shape[1] - 1
    if freedom < 1:
        return None
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@torch.no_grad()
def _log_probabilities(target: Target, rows: list[list[int]], temperature: float = 1.0) -> torch.Tensor:
    """Of the token after each row, float64 [B, V], by the target's own modules."""
    ids = torch.tensor(rows, device=target.device)
    return (target.model(ids, use_cache=False).logits[:, -1].double() / temperature).log_softmax(-1).cpu()
