"""What an error's line shows of arguments that do not fit."""

import numpy as np
import pytest
import torch

from dflash_ext.checks import check_numbers, check_operands, check_tensors, has_integers, is_int, shown


def test_what_came_is_one_short_line():
    for value in (
        ["a" * 1000] * 1000,
        torch.zeros(9, 9, 9, 9).tolist(),
        [torch.zeros(50, 50)] * 9,
        "a\n" * 50,
        10**500,
    ):
        assert len(shown(value)) < 300 and "\n" not in shown(value)


def test_a_tensor_is_no_number():
    check_numbers("op", scale=0.5, softcap=None, window=3)
    for value, what in ((torch.ones(()), r"torch.float32 \[\]"), ("1", r"'1' \(str\)")):
        with pytest.raises(TypeError, match=rf"^op: scale is {what}; a number or None is needed$"):
            check_numbers("op", scale=value)
    with pytest.raises(TypeError, match=r"^op: eps is None; a number is needed$"):
        check_numbers("op", needed={"eps": None})


def test_operands_are_dense_and_on_one_device():
    x = torch.ones(2)
    check_tensors("op", a=x, b=x)
    check_operands("op", a=x, b=None, c=3)
    with pytest.raises(TypeError, match=r"^op: b is \[1.0\] \(list\); a tensor is needed$"):
        check_tensors("op", a=x, b=[1.0])
    check_tensors("op", a=x, optional={"b": x, "c": None}, numbers={"d": x, "e": 2.5, "f": None})
    with pytest.raises(TypeError, match=r"^op: b is 1.0 \(float\); a tensor or None is needed$"):
        check_tensors("op", a=x, optional={"b": 1.0})
    for value in ("1", [1.0], 1j, np.ones(2), x.to(torch.complex64)):
        with pytest.raises(TypeError, match="^op: b is .*; a real number, a tensor of them or None is needed$"):
            check_tensors("op", a=x, numbers={"b": value})
    with pytest.raises(ValueError, match="^op: a is on cpu, c on meta; one device is needed$"):
        check_operands("op", a=x, b=None, c=x.to("meta"))
    with pytest.raises(ValueError, match="^op: a is a torch._mkldnn tensor; a dense one"):
        check_operands("op", a=torch.eye(2).to_mkldnn())
    with pytest.raises(ValueError, match="^op: b is a nested tensor; a dense one"):
        check_operands("op", b=torch.nested.nested_tensor([x, x], layout=torch.jagged))


def test_integers_are_neither_bools_nor_complex():
    assert has_integers(torch.ones(2, dtype=torch.uint8))
    assert not any(has_integers(torch.ones(2, dtype=dtype)) for dtype in (torch.bool, torch.half, torch.complex64))


def test_one_integer():
    ints = (3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8))
    others = (
        True,
        np.bool_(True),
        torch.tensor(True),
        3.0,
        np.float32(3),
        torch.tensor(3.0),
        torch.tensor([3]),
        "3",
        None,
    )
    assert all(map(is_int, ints)) and not any(map(is_int, others))
