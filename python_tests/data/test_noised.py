import pytest
import torch

from dflash_ext.data import NoiseCollator, UniformCollator
from dflash_ext.data.noised import SHORTEST
from dflash_ext.noise import MaskNoise, Share

LENGTH = 60
STARTS = [0, 3, 23, 57]  # documents of 3, 20, 34 and 3 tokens


def sample(key=(0, 0, 0)):
    ids = torch.randint(3, 90, (LENGTH,), generator=torch.Generator().manual_seed(key[2]))
    return {"input_ids": ids, "starts": torch.tensor(STARTS), "key": key}


def half(rate=0.25, span=1.0):
    return MaskNoise(Share(rate, rate), span)


def test_tokens_are_hidden_in_the_blocks_of_documents():
    batch = NoiseCollator(half(0.5))([sample()])
    ends = [*STARTS[1:], LENGTH]
    for start, end in zip(STARTS, ends, strict=True):
        document = {name: row[0, start:end] for name, row in batch.items()}
        assert (document["starts"] == start).all() and (document["ends"] == end).all()
        length = end - start
        prefix = length if length < SHORTEST else length // 2
        assert (document["blocks"] == start + prefix).all()
        assert not document["hidden"][:prefix].any()
        assert int(document["hidden"][prefix:].sum()) == round((length - prefix) / 2)
    assert torch.equal(batch["input_ids"][0], sample()["input_ids"])
    assert torch.equal(batch["weights"], batch["hidden"].float())


def test_shares_of_the_prefix_are_drawn():
    collator = NoiseCollator(half(), Share(0.1, 0.9))
    prefixes = torch.cat([collator([sample((0, step, 0))])["blocks"][:, 23] - 23 for step in range(100)])
    assert 3 <= prefixes.min() < 6 and 28 < prefixes.max() <= 31
    for share, prefix in ((0.0, 1), (0.999, 33)):  # a token of either kind is left
        assert NoiseCollator(half(), Share(share, share))([sample()])["blocks"][0, 23] == 23 + prefix


def test_a_prefix_that_may_be_a_whole_document_is_refused():
    with pytest.raises(ValueError, match="a prefix of 0.5 to 1 leaves no token to denoise: a share below 1 is needed"):
        NoiseCollator(prefix=Share(0.5, 1))
    with pytest.raises(ValueError, match="a prefix of 1 leaves no token to denoise"):
        UniformCollator(prefix=Share(1, 1), vocab_size=9)


def test_the_room_bounds_the_hidden_tokens():
    sizes = set()
    for step in range(40):
        batch = NoiseCollator(MaskNoise(Share(0.01, 0.9)))([sample((0, step, row)) for row in range(3)])
        hidden, room = int(batch["hidden"].sum()), batch["room"].numel()
        assert hidden <= room < hidden + 3 * 2 and batch["room"].shape[0] == 3
        sizes.add(room)
    assert 3 < len(sizes) < 32
    short = {"input_ids": torch.arange(3), "starts": torch.tensor([0]), "key": (0, 0, 0)}  # nothing is hidden
    assert NoiseCollator()([short])["room"].shape == (1, 1)


def test_noise_is_drawn_for_each_block():
    batch = NoiseCollator(half(0.5), Share(0, 0), block_size=8)([sample()])
    counts = [int(each.sum()) for each in batch["hidden"][0, 24:57].split(8)]
    assert counts == [4, 4, 4, 4, 1]


def test_complementary_rows_hide_the_other_tokens():
    batch = NoiseCollator(half(0.25, 3), complementary=True, inverse_rate=True)([sample(), sample((0, 0, 1))])
    assert batch["input_ids"].shape == (4, LENGTH)
    in_block = torch.arange(LENGTH) >= batch["blocks"]
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(batch["input_ids"][first], batch["input_ids"][second])
        assert not (batch["hidden"][first] & batch["hidden"][second]).any()
        assert torch.equal(batch["hidden"][first] | batch["hidden"][second], in_block[first])
    rates = batch["hidden"][:, 40:57].float().mean(1)
    torch.testing.assert_close(rates[0] + rates[1], torch.tensor(1.0))


@pytest.mark.parametrize("complementary", [False, True])
def test_inverse_rates_add_up_to_the_tokens_of_blocks(complementary):
    collator = NoiseCollator(MaskNoise(Share(0.1, 0.9)), block_size=8, inverse_rate=True, complementary=complementary)
    batch = collator([sample()])
    in_block = (torch.arange(LENGTH) >= batch["blocks"]).sum(1).float()
    # A block whose tokens are all hidden has nothing to hide in its complement.
    torch.testing.assert_close(batch["weights"].sum(1)[:1], in_block[:1])
    assert (batch["weights"][~batch["hidden"]] == 0).all() and (batch["weights"][batch["hidden"]] >= 1).all()


def test_draws_follow_from_the_key():
    collator = NoiseCollator(MaskNoise(Share(0.1, 0.9), 3), Share(0.2, 0.8))
    alone, together = collator([sample((1, 2, 3))]), collator([sample((1, 2, 4)), sample((1, 2, 3))])
    for name in alone.keys() - {"room"}:
        assert torch.equal(alone[name][0], together[name][1]), name
    for key in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(alone["hidden"], collator([sample(key)])["hidden"])
