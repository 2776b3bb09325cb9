"""A drafter that the package specforge trains, saves and exports is read here; `make test-peers` installs it."""

import json

import pytest
import torch

from dflash_ext.models import Target, load_drafter
from python_tests.models.specforge_configs import BLOCK, TAPS, draft_config, exported_config
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model

auto = pytest.importorskip("specforge.modeling.auto")
family = pytest.importorskip("specforge.algorithms.common.dflash_family_model")
checkpoint = pytest.importorskip("specforge.training.checkpoint")
to_hf = pytest.importorskip("specforge.export.to_hf")


def trained(target: Target, path, steps: int = 4):
    """SpecForge's drafter after some steps of its own training module, which it keeps in a checkpoint."""
    torch.manual_seed(0)
    drafter = auto.AutoDraftModel.from_config(auto.AutoDraftModelConfig.from_file(str(path / "draft.json")))
    drafter.config._attn_implementation = "sdpa"
    tables = torch.nn.Linear(64, target.vocab_size, bias=False), torch.nn.Embedding(target.vocab_size, 64)
    for table, weight in zip(tables, (target.head, target.embedding), strict=True):
        table.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    module = family.OnlineDFlashModel(drafter, *tables, MASK_TOKEN, BLOCK, attention_backend="sdpa", num_anchors=4)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    tokens = torch.tensor(random_prompts(30, 30))
    for _ in range(steps):
        module(tokens, target.features(tokens), torch.ones_like(tokens))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    manager = checkpoint.CheckpointManager(str(path / "run"), "tiny")
    manager.save({"draft_state_dict": drafter.state_dict()}, steps)
    return drafter.eval()


@pytest.mark.parametrize("layers", [("full_attention",) * 2, ("sliding_attention", "full_attention")])
@torch.no_grad()
def test_its_forward_is_ours(tmp_path, layers):
    """The logits of two blocks, under SpecForge's masks of training and in decoding, behind whole contexts."""
    window = 7 if "sliding_attention" in layers else None
    (tmp_path / "draft.json").write_text(json.dumps(draft_config(*layers, window=window)))
    target = Target(tiny_model("qwen3"), TAPS)
    with torch.enable_grad():
        model = trained(target, tmp_path)
    to_hf.export_to_hf(str(tmp_path / "run"), str(tmp_path / "draft.json"), str(tmp_path / "exported"))
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    expected = exported_config(*layers, window=window)
    assert {key: written[key] for key in expected if key != "transformers_version"} == {
        key: value for key, value in expected.items() if key != "transformers_version"
    }
    drafter = load_drafter(tmp_path / "exported", dtype=torch.float32, device=torch.device("cpu"))
    drafter.check_target(target)

    length, anchors = 20, torch.tensor([[6, 15]])
    tokens = torch.tensor(random_prompts(length))
    block = torch.full((1, 2, BLOCK), MASK_TOKEN)
    block[:, :, 0] = tokens.gather(1, anchors)
    slots = (anchors[:, :, None] + torch.arange(BLOCK)).flatten(1)
    features = target.features(tokens)
    options = (anchors, torch.ones_like(anchors, dtype=torch.bool), length, BLOCK, tokens.device)
    masks = {
        kind: family.create_dflash_sdpa_mask(*options, sliding_window=size)
        for kind, size in (("full_attention", None), ("sliding_attention", window))
    }
    theirs = model(
        position_ids=torch.cat([torch.arange(length)[None], slots], dim=1),
        noise_embedding=drafter.embed(target, block.flatten(1)),
        target_hidden=features,
        attention_mask=masks,
    ).unflatten(1, (2, BLOCK))
    for each, anchor in enumerate(anchors[0].tolist()):
        ours = drafter(
            noise_embeds=drafter.embed(target, block[:, each]),
            context_hidden_states=features[:, :anchor],
            position_ids=torch.arange(anchor + BLOCK)[None],
        ).last_hidden_state
        expected = drafter.logits(target, theirs[:, each])
        torch.testing.assert_close(drafter.logits(target, ours), expected, atol=2e-5, rtol=1e-4)


def test_the_example_exports_and_measures(tmp_path):
    """From SpecForge's checkpoint to the figures of `dflash-ext evaluate`."""
    from python_tests.test_examples import run, saved_target

    (tmp_path / "draft.json").write_text(json.dumps(draft_config("full_attention")))
    model = saved_target(tmp_path / "target")
    trained(Target(model, TAPS), tmp_path, steps=1)
    names = ("run", "draft.json", "drafter", "target", "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w005 w006 w007"}) + "\n")
    assert "prompts, drafter" in run("examples/specforge_drafter.py", *(tmp_path / name for name in names))
