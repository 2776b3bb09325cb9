"""Fewer cases of a test than all combinations of its parameters."""

import itertools
from collections.abc import Sequence


def pairwise(*factors: Sequence) -> list[tuple]:
    """Combinations, one value of each factor, in which every two values of two factors meet at least once.

    A fault usually needs one value or two to show. The list is the same in every process, as pytest-xdist needs.
    """
    every = list(itertools.product(*(range(len(factor)) for factor in factors)))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in every}
    unmet, cases = set().union(*pairs.values()), []
    while unmet:
        case = max(every, key=lambda case: len(unmet & pairs[case]))
        unmet -= pairs[case]
        cases.append(tuple(factor[i] for factor, i in zip(factors, case, strict=True)))
    return cases
