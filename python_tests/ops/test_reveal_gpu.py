"""reveal on a GPU: rows of any length, replayed graphs; test_reveal.py has what holds on every device."""

import pytest
import torch

from dflash_ext import reveal
from python_tests.ops.test_reveal import LIMITS, canvas

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", LIMITS)
def test_matches_the_cpu_kernel(rule, dtype):
    for length in (1, 31, 512, 513, 4096, 16_384, 16_385, 40_000):
        scores, masked, entropy = canvas(8, length, dtype, length)
        for order in (scores, -entropy):
            for limit in LIMITS[rule]:
                got = reveal(order.cuda(), masked.cuda(), entropy=entropy.cuda(), **{rule: limit})
                assert torch.equal(got.cpu(), reveal(order, masked, entropy=entropy, **{rule: limit})), (length, limit)


def test_a_captured_graph_reads_new_scores_and_limits():
    scores, masked, entropy = (x.cuda() for x in canvas(8, 256))
    count, bound = torch.full((8,), 3, device="cuda"), torch.tensor(0.5, device="cuda")
    graph = torch.cuda.CUDAGraph()
    reveal(scores, masked, count=count)
    with torch.cuda.graph(graph):
        by_count = reveal(scores, masked, count=count)
        by_bound = reveal(-entropy, masked, entropy=entropy, entropy_bound=bound)
    for step in range(3):
        for x, new in zip((scores, masked, entropy), canvas(8, 256, seed=step), strict=True):
            x.copy_(new)
        count.fill_(step + 1)
        bound.fill_(step * 0.7)
        graph.replay()
        assert torch.equal(by_count, reveal(scores, masked, count=count))
        assert torch.equal(by_bound, reveal(-entropy, masked, entropy=entropy, entropy_bound=bound))
