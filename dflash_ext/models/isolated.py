"""Every layer of a model on an input of its own, so that nothing that happens in one layer is passed on to the next.

Over a whole model, rounding in bfloat16 grows to several percent, behind which a wrong scale hides. In one layer it
stays below that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

Read = Callable[[int, str, Tensor], None]
Outputs = dict[tuple[int, str], Tensor]


@contextmanager
def isolated(layers: Sequence[nn.Module], inputs: Tensor, read: Read) -> Iterator[None]:
    """Within it, forwards of this thread give these inputs to every layer, whatever the layer before it puts out.

    Args:
        inputs: [B, L, H].
        read: called with the number of a layer, the name of one of its modules ("" for the layer itself) and what that
            puts out, if it is [B, L, ...]. Under the name "input" it gets what the first layer would have got.
    """
    thread = threading.get_ident()

    def seen(number: int, name: str, output: object) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.shape[:2] == inputs.shape[:2]:
            read(number, name, output)

    def before(number: int) -> Callable:
        def replace(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            given = args[0] if args else kwargs.get("hidden_states")
            if threading.get_ident() != thread or not isinstance(given, Tensor):
                return None
            if number == 0:
                seen(0, "input", given)
            other = inputs.to(given.device, given.dtype).expand_as(given)
            return ((other, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": other})

        return replace

    def behind(number: int, name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: object) -> None:
            if threading.get_ident() == thread:
                seen(number, name, output)

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(before(number), with_kwargs=True).remove)
            for name, module in (("", layer), *layer.named_children()):
                hooks.callback(module.register_forward_hook(behind(number, name)).remove)
        yield


def random_states(rows: int, length: int, width: int, seed: int = 0) -> Tensor:
    """Random inputs of layers, [rows, length, width] in float32 on the CPU."""
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def layer_outputs(layers: Sequence[nn.Module], inputs: Tensor, forward: Callable[[], object]) -> Outputs:
    """What the modules of each layer put out in a forward under `isolated`, by the number and the name of `read`."""
    found: Outputs = {}
    with isolated(layers, inputs, lambda number, name, output: found.update({(number, name): output})):
        forward()
    return found


def all_near(first: Mapping[object, Tensor], second: Mapping[object, Tensor]) -> bool:
    """Whether the tensors of the same names are `near` each other."""
    return first.keys() == second.keys() and all(near(first[name], each) for name, each in second.items())


def near(first: Tensor, second: Tensor) -> bool:
    """Whether results of one layer are equal but for rounding.

    Their distance is at most four rounding steps of their dtype, as a share of the norm; in float32, where sums of many
    numbers round more than a step, at most 3e-4.
    """
    bound = max(4 * torch.finfo(first.dtype).eps, 3e-4)
    first, second = first.float(), second.float().to(first.device)
    return bool((first - second).norm() <= bound * second.norm())
