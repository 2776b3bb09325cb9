"""The table of what serves each operator names every operator."""

import dflash_ext
from dflash_ext.ops.backends import SERVED_BY


def test_every_operator_has_a_server_on_each_kind_of_device():
    public = {name for name in dflash_ext.__all__ if name.islower()} - {"reveal_count"}
    assert set(SERVED_BY) == public
    assert all(set(by_device) == {"cpu", "cuda"} for by_device in SERVED_BY.values())
