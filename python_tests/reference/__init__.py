import torch


def randn(*shape, seed=0, **options):
    options.setdefault("dtype", torch.float64)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)
