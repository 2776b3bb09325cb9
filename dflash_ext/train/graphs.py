"""Training steps that are recorded as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..decode.capture import capture
from .losses import Losses

Batch = Mapping[str, Tensor]


class GraphedPasses:
    """Runs the forward and the backward pass of batches, each shape of batch from its second time on by a CUDA graph.

    The passes of a small model are thousands of short kernels, which the host launches more slowly than a GPU runs
    them. A replayed graph launches them all at once. All graphs share one pool of memory, which holds what the passes
    of the largest batch need.

    All passes run in one stream beside the current one. Whatever may keep the nodes of an earlier pass, in which the
    gradients of parameters belong to a stream, then does not bring another stream into a recording.

    Args:
        passes: runs both passes of a batch, with a loss that is divided by the second argument, and adds to the
            gradients. It gives the loss and the batch's losses. It must not wait for the device.
        parameters: those that get gradients.
    """

    def __init__(self, passes: Callable[[Batch, Tensor], tuple[Tensor, Losses]], parameters: Iterable[nn.Parameter]):
        self.passes, self.parameters = passes, list(parameters)
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: dict[tuple, _Recorded | None] = {}  # None for a shape that came once

    def __call__(self, batch: Batch, divisor: Tensor) -> tuple[Tensor, Losses]:
        """Adds to the gradients of the parameters. What it returns holds until the next call."""
        divisor = divisor.to(next(iter(batch.values())).device, torch.float32, non_blocking=True)
        shape = tuple((name, tensor.shape) for name, tensor in batch.items())
        if shape not in self.graphs:
            self.graphs[shape] = None
            return self._launched(batch, divisor)
        if self.graphs[shape] is None:
            self.graphs[shape] = _Recorded(self, batch, divisor)
        return self.graphs[shape].replay(batch, divisor)

    def _launched(self, batch: Batch, divisor: Tensor) -> tuple[Tensor, Losses]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self.passes(batch, divisor)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results


class _Recorded:
    """The graph of one shape of batch, with the inputs that it reads and the results that it writes."""

    def __init__(self, owner: GraphedPasses, batch: Batch, divisor: Tensor):
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        self.divisor, self.parameters = divisor.clone(), owner.parameters
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # the graph then writes gradients, and does not add to any
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, may go on calling CUDA meanwhile.
        with capture(self.graph, pool=owner.pool, stream=owner.stream, capture_error_mode="thread_local"):
            self.results = owner.passes(self.batch, self.divisor)
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient

    def replay(self, batch: Batch, divisor: Tensor) -> tuple[Tensor, Losses]:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.divisor.copy_(divisor)
        before = [parameter.grad for parameter in self.parameters]
        adds = before[0] is not None
        if adds:  # those that a graph wrote would be overwritten
            before = [gradient.clone() for gradient in before]
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        if adds:
            torch._foreach_add_(self.gradients, before)
        return self.results
