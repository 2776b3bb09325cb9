"""What the training operators share in autograd."""

from __future__ import annotations

from typing import NoReturn

import torch


def refuse_second_derivative(op: str) -> None:
    """Makes autograd raise where it would have to differentiate ``op``'s backward, ``dflash_ext::<op>_backward``.

    Without a formula autograd treats the gradient as a constant, and a gradient penalty would silently do nothing.
    """

    def refuse(ctx, *grads) -> NoReturn:
        raise RuntimeError(f"{op}: its gradient has no derivative; first derivatives are supported")

    torch.library.register_autograd(f"dflash_ext::{op}_backward", refuse)
