import pytest
import torch

from dflash_ext.models import load_denoiser, save_adaptation
from dflash_ext.models.adaptation import positions_of
from python_tests.models.test_adaptation import FAMILIES, adaptation_of, batch_of, states, target_of
from python_tests.tiny import MASK_TOKEN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_copy_gives_the_same_states(tmp_path, family):
    adaptation, batch = adaptation_of(family), batch_of()
    save_adaptation(adaptation, tmp_path)
    base = target_of(family)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    denoiser = load_denoiser(base.model, tmp_path)
    target = denoiser.target
    ids = batch["input_ids"].masked_fill(batch["hidden"], MASK_TOKEN)
    masks = adaptation.inputs(batch)[3]
    got = target.decoder(
        input_ids=ids, position_ids=positions_of(batch), use_cache=False, **target.mask_arguments(masks)
    )[0]
    torch.testing.assert_close(got, states(adaptation, batch), atol=1e-3, rtol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    # What is not adapted is not copied.
    assert target.head.data_ptr() == base.head.data_ptr()


def test_how_it_was_trained_reaches_the_canvas_loop(tmp_path):
    for options, attention, prefix in (
        ({"pattern": "causal"}, "causal", "causal"),
        ({"pattern": "prefix_block"}, "bidirectional", "causal"),
        ({"pattern": "block_causal", "block_size": 4}, "bidirectional", "causal"),
        ({"pattern": "block_causal", "block_size": 4, "context": "block_causal"}, "bidirectional", "block_causal"),
    ):
        save_adaptation(adaptation_of("llama", **options), tmp_path)
        denoiser = load_denoiser(target_of("llama").model, tmp_path)
        assert (denoiser.attention, denoiser.prefix, denoiser.mask_id) == (attention, prefix, MASK_TOKEN)
        assert denoiser.mask_embedding.shape == (64,)
