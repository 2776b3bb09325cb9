import pytest


@pytest.fixture
def merged(request, monkeypatch):
    """Whether the adapter is added to a copy of the weights, or runs in products of its own."""
    if not request.param:
        monkeypatch.setattr("dflash_ext.decode.forward.adapted.MOST_MERGED", 0)
    return request.param
