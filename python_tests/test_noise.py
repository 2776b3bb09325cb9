import pytest
import torch

from dflash_ext.noise import MaskNoise, Share


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spans_of(hidden):
    """The lengths of the runs of True."""
    edges = torch.nn.functional.pad(hidden.int(), (1, 1)).diff()
    return (edges == -1).nonzero() - (edges == 1).nonzero()


@pytest.mark.parametrize("span", [1, 1.5, 3, 50])
@pytest.mark.parametrize("rate", [0.001, 0.15, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 256])
def test_the_share_is_exact(length, rate, span):
    noise = MaskNoise(Share(rate, rate), span)
    for seed in range(5):
        hidden = noise.draw(length, generator(seed))
        assert hidden.shape == (length,) and hidden.dtype == torch.bool
        assert int(hidden.sum()) == max(round(rate * length), 1)


def test_rates_are_drawn_within_their_bounds():
    noise = MaskNoise(Share(0.2, 0.6))
    rates = torch.stack([noise.draw(1000, generator(seed)).float().mean() for seed in range(200)])
    assert 0.199 < rates.min() < 0.23 and 0.57 < rates.max() < 0.601 and abs(rates.mean() - 0.4) < 0.03


def test_spans_have_their_mean_length():
    for span, low, high in ((1, 1.0, 1.2), (4, 3.8, 4.6)):
        noise = MaskNoise(Share(0.1, 0.1), span)
        lengths = torch.cat([spans_of(noise.draw(2000, generator(seed))) for seed in range(40)]).float()
        assert low <= lengths.mean() <= high


@pytest.mark.parametrize("span", [1, 3])
def test_every_token_is_hidden_equally_often(span):
    noise = MaskNoise(Share(0.25, 0.25), span)
    shares = torch.stack([noise.draw(12, generator(seed)) for seed in range(4000)]).float().mean(0)
    assert (shares - 0.25).abs().max() < 0.04


def test_draws_follow_from_the_generator():
    noise = MaskNoise(Share(0.1, 0.9), 3)
    assert torch.equal(noise.draw(100, generator(3)), noise.draw(100, generator(3)))
    assert not torch.equal(noise.draw(100, generator(3)), noise.draw(100, generator(4)))


def test_what_is_no_noise():
    with pytest.raises(ValueError, match="a mask rate of 0 hides no token"):
        MaskNoise(Share(0, 0))
    with pytest.raises(ValueError, match="spans of 0.5 tokens"):
        MaskNoise(span=0.5)
    for low, high in ((-0.1, 0.5), (0.6, 0.5), (0.5, 1.1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="is no share"):
            Share(low, high)
