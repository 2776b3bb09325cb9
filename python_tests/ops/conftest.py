import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Memory that torch has not filled yet holds NaN: an output or scratch that is read unwritten shows.

    What a test allocated on a GPU is free for other processes after it.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
