"""The package speculators reads what is written here, and the other way round; `make test-peers` installs it."""

import pytest
import torch

from dflash_ext.models import DFlashDrafter, Target, load_drafter, save_drafter, save_speculators_drafter
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model

dflash = pytest.importorskip("speculators.models.dflash")
entrypoints = pytest.importorskip("speculators.convert.entrypoints")
LENGTH, TAPS = 24, [0, 2, 4]


@pytest.fixture(params=["llama", "qwen3"])
def pair(request, tmp_path) -> tuple[Target, DFlashDrafter]:
    """A target that was loaded from a folder, and a drafter with every kind of layer that speculators has."""
    tiny_model(request.param).save_pretrained(tmp_path / "target")
    model = tiny_model(request.param).from_pretrained(tmp_path / "target", dtype=torch.float32)
    target = Target(model.requires_grad_(False), TAPS)
    torch.manual_seed(1)
    drafter = DFlashDrafter.for_target(target, mask_token_id=MASK_TOKEN, num_layers=2, block_size=5, taps=TAPS)
    for parameter in drafter.parameters():  # its norms, too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return target, drafter.requires_grad_(False).eval()


def slide(drafter: DFlashDrafter, causal: bool | None) -> None:
    """Gives the first layer a window of 3 tokens as speculators has it."""
    config = drafter.config
    config.layer_types = ["sliding_attention", *config.layer_types[1:]]
    config.sliding_window, config.use_sliding_window = 3, True
    config.window_convention, config.is_causal = "speculators", causal


def their_model(folder):
    """speculators' own model of a folder, with attention under dense masks, which a CPU can run."""
    config = dflash.DFlashSpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return dflash.DFlashDraftModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@torch.no_grad()
def differences(model, target: Target, drafter: DFlashDrafter) -> float:
    """The largest difference of the logits of their forward, at the anchors that it draws, from those of ours."""
    tokens = torch.tensor(random_prompts(LENGTH))
    features, hidden = target.features_and_hidden(tokens)
    _, theirs, _, _, indices = model._backbone_forward(
        features,
        tokens,
        torch.ones_like(tokens),
        hidden,
        torch.zeros_like(tokens),
        max_anchors=4,
    )
    size = drafter.config.block_size
    anchors = indices.view(-1, size)[:, 0][None]
    block = torch.full((1, anchors.shape[1], size), MASK_TOKEN)
    block[:, :, 0] = tokens.gather(1, anchors)
    positions = torch.cat([torch.arange(LENGTH)[None], indices.view(1, -1)], dim=1)
    output = drafter(
        noise_embeds=drafter.embed(target, block.flatten(1)),
        context_hidden_states=features,
        position_ids=positions,
        attention_mask=drafter.anchor_masks(LENGTH, anchors),
    ).last_hidden_state
    ours = drafter.logits(target, output)[0]
    return float((ours - theirs[0]).abs().max() / ours.abs().max())


@pytest.mark.parametrize("layers", ["full", "sliding", "sliding, not causal"])
def test_it_loads_what_is_written_here(pair, tmp_path, layers):
    target, drafter = pair
    if layers != "full":
        slide(drafter, None if layers == "sliding" else False)
    save_speculators_drafter(drafter, target, tmp_path / "written")
    model = their_model(tmp_path / "written")
    assert differences(model, target, drafter) < 1e-5
    model.save_pretrained(tmp_path / "theirs")
    again = load_drafter(tmp_path / "theirs", dtype=torch.float32, device=torch.device("cpu"))
    assert differences(model, target, again) < 1e-5
    kept = ("block_size", "layer_types", "sliding_window", "rms_norm_eps", "rope_parameters", "dflash_config")
    assert all(getattr(again.config, key) == getattr(drafter.config, key) for key in kept)


@pytest.mark.filterwarnings("ignore:the drafter in")
def test_it_converts_what_is_written_here(pair, tmp_path):
    """Published layout -> speculators' converter -> our loader -> published layout -> the converter again."""
    target, drafter = pair
    first = None
    for turn in ("once", "twice"):
        save_drafter(drafter, tmp_path / turn)
        converted = tmp_path / f"{turn}-theirs"
        names = dict(verifier=str(tmp_path / "target"), algorithm="dflash", output_path=str(converted))
        entrypoints.convert_model(str(tmp_path / turn), **names)
        model = their_model(converted)
        assert differences(model, target, drafter) < 1e-5
        first = first or model
        drafter = load_drafter(converted, dtype=torch.float32, device=torch.device("cpu"))
        assert differences(first, target, drafter) < 1e-5
