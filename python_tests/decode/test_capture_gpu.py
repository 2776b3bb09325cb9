"""Captures of CUDA graphs that fail, and what may happen within one."""

import gc

import pytest
import torch

from dflash_ext.decode.capture import capture

pytestmark = pytest.mark.gpu


def test_a_capture_that_fails_leaves_streams_and_random_numbers_as_they_were():
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError), capture(torch.cuda.CUDAGraph(), pool=None):
        torch.cuda.synchronize()
    assert torch.cuda.current_stream() == stream and gc.isenabled()
    assert torch.rand(3, device="cuda").shape == (3,)
    graph, ones = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda")
    with capture(graph, pool=None):
        twos = ones + 1
    graph.replay()
    assert twos.tolist() == [2, 2, 2]


def test_garbage_with_a_graph_in_it_is_not_collected_within_a_capture():
    ones = torch.ones(3, device="cuda")
    other = torch.cuda.CUDAGraph()
    with capture(other, pool=None):
        ones + 1
    ring = [other]
    ring.append(ring)
    graph = torch.cuda.CUDAGraph()
    with capture(graph, pool=None):
        del ring, other
        kept = [[each] for each in range(200_000)]  # so many new lists start a collection
        twos = ones + 1
    graph.replay()
    assert twos.tolist() == [2, 2, 2] and len(kept) == 200_000
