"""What the annotations of a function refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dflash_ext.arguments import checked, shown


@checked
def function(
    x: Tensor,
    n: int | Tensor,
    *,
    size: float | None = None,
    parts: Sequence[Tensor] = (),
    flag: bool = False,
    free: object = "",
):
    """Of everything."""
    return x, n, size, parts, free


class Owner:
    @checked
    def method(self, n: int) -> Owner:
        return n

    @staticmethod
    @checked
    def static(offsets: Sequence[int] | Tensor, inner: Callable[..., Owner] | None = None):
        return offsets


X = torch.ones(2)


def test_what_fits_goes_through():
    parameter = torch.nn.Parameter(X)
    assert function(parameter, X, size=1, parts=[X, parameter], free=3)[1] is X
    assert function(X, np.int64(3), size=np.float32(0.5), parts=(X,))[1] == 3
    assert function(x=X, n=2) == (X, 2, None, (), "")
    assert (
        function(X, torch.tensor(2), size=X[0], flag=np.bool_(True))[2].item() == 1
        and Owner().method(torch.tensor(4)) == 4
    )
    assert Owner().method(3) == 3 and Owner.static((0, 3)) == (0, 3) and Owner.static(X) is X
    assert function.__doc__ == "Of everything."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: function([1.0], 2), "function: x is [1.0] (list); a tensor is needed"),
        (lambda: function(X.numpy(), 2), "function: x is of type ndarray; a tensor is needed"),
        (lambda: function(None, 2), "function: x is None; a tensor is needed"),
        (lambda: function(X, n=2.0), "function: n is 2.0 (float); an int or a tensor is needed"),
        (lambda: function(X, True), "function: n is True (bool); an int or a tensor is needed"),
        (lambda: function(X, 2, size="1"), "function: size is '1' (str); a number or None is needed"),
        (lambda: function(X, 2, size=X), "function: size is torch.float32 [2]; a number or None is needed"),
        (lambda: function(X, 2, parts=[2]), "function: parts is [2] (list); a sequence of tensors is needed"),
        (lambda: function(X, 2, parts=X), "function: parts is torch.float32 [2]; a sequence of tensors is needed"),
        (lambda: Owner().method(torch.tensor(2.0)), "Owner.method: n is torch.float32 []; an int is needed"),
        (lambda: function(X, 2, size=X[0] > 0), "function: size is torch.bool []; a number or None is needed"),
        (lambda: Owner().method(2.5), "Owner.method: n is 2.5 (float); an int is needed"),
        (
            lambda: function(X, 2, size=X[0].to("meta")),
            "function: size is torch.float32 []; a number or None is needed",
        ),
        (lambda: function(X, 2, size=X[0] + 1j), "function: size is torch.complex64 []; a number or None is needed"),
        (
            lambda: function(X, 2, size=X[0].clone().requires_grad_()),
            "function: size is torch.float32 [] that requires grad; a number or None is needed",
        ),
        (lambda: function(X, 2, flag=1), "function: flag is 1 (int); a bool is needed"),
        (lambda: function(X, 2, flag="no"), "function: flag is 'no' (str); a bool is needed"),
        (
            lambda: Owner.static([0, 1.5]),
            "Owner.static: offsets is [0, 1.5] (list); a sequence of ints or a tensor is needed",
        ),
    ],
)
def test_what_does_not_is_named(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_what_came_is_one_short_line():
    for value in (
        ["a" * 1000] * 1000,
        torch.zeros(9, 9, 9, 9).tolist(),
        [torch.zeros(50, 50)] * 9,
        "a\n" * 50,
        10**500,
    ):
        assert len(shown(value)) < 300 and "\n" not in shown(value)


def test_every_function_has_a_code_object_of_its_own():
    """torch.compile counts recompilations by code object, and gives up at eight."""
    assert len({f.__code__ for f in (function, Owner.method, Owner.static)}) == 3


def test_a_compiled_graph_does_not_break():
    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    for n in (2, 3, 4):
        assert compiled(X, n, size=0.5, parts=[X])[1] == n
