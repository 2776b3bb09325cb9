"""How wrong an operator may be beside PyTorch's own op in the same dtype, both held against a definition in float64."""

import torch

# The definition and PyTorch's float64 ops round as well, each in an order of its own.
DEFINITION = 8 * torch.finfo(torch.float64).eps


def allowed_error(torchs_error: float, rounding: float) -> float:
    """1.5 times PyTorch's own error, or the `rounding` of the result's dtype if that is more, in addition to what the
    definition is itself wrong by. All three are relative."""
    return max(1.5 * torchs_error, rounding) + DEFINITION
