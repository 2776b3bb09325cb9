"""Targets whose layers lie on two GPUs: they decode, and train drafters, as those on one device."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dflash_ext.decode import Engine, decode
from dflash_ext.models import DFlashDrafter, Target
from dflash_ext.train import Recipe, train_drafter
from python_tests.decode.test_families import tiny
from python_tests.tiny import FAMILIES, MASK_TOKEN, random_prompts, tiny_model
from python_tests.train.test_training import Cycles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="layers on two GPUs need two GPUs"),
]
LAYERS = 6


def places(*, offloads: bool = False) -> dict[str, int | str]:
    """A device map of the first layers on GPU 0 and the others, with the head, on GPU 1; or the last ones in memory."""
    last = "cpu" if offloads else 1
    layers = {f"model.layers.{i}": 0 if i < 2 else 1 if i < 4 else last for i in range(LAYERS)}
    return {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": last, **layers}


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    tiny_model(request.param, tie_word_embeddings=False).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def load(folder, device_map, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=dtype)
    return model.eval().requires_grad_(False)


def pair(model) -> tuple[Target, DFlashDrafter]:
    torch.manual_seed(0)
    options = dict(num_layers=1, block_size=4, taps=[1, 3, 5])
    target = Target(model, options["taps"])
    drafter = DFlashDrafter.for_target(target, mask_token_id=MASK_TOKEN, **options)
    return target, drafter.to(target.device, target.dtype).eval()


@pytest.mark.parametrize("offloads", [False, True])
def test_it_decodes_as_on_one_device(saved, offloads):
    spread, alone = (pair(load(saved, where)) for where in (places(offloads=offloads), 0))
    target, drafter = spread
    assert target.device == torch.device("cuda", 0)
    prompts = random_prompts(30, 9, 4, 17)
    want = decode(alone[0], None, prompts, max_new_tokens=24)
    for choice in (None, drafter):
        got = decode(target, choice, prompts, max_new_tokens=24)
        assert [each.tokens for each in got.completions] == [each.tokens for each in want.completions]
    for prompt, each in zip(prompts, want.completions, strict=True):
        ids = torch.tensor([prompt], device=target.device)
        answer = target.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert answer[0, len(prompt) :].tolist() == each.tokens
    ids = torch.tensor(prompts[:1], device=target.device)
    torch.testing.assert_close(target.features(ids), alone[0].features(ids), atol=1e-4, rtol=1e-4)
    target.check_head()
    assert target.fingerprint == alone[0].fingerprint and target.head.device == target.device


def test_block_attn_reads_the_slots_of_both_devices(saved):
    """In bfloat16 the engine would make graphs on one device; here it calls the modules, and attention stays ours."""
    target, drafter = pair(load(saved, places(), torch.bfloat16))
    engine = Engine(target, drafter, slots=3, max_length=80)
    assert engine.cycle.target.reads_slots and type(engine.runner).__name__ == "PlainRunner"
    assert {layer.keys.device.index for layer in engine.cycle.target.cache.layers} == {0, 1}
    requests = [engine.submit(prompt, max_new_tokens=24) for prompt in random_prompts(30, 9, 4, 17)]
    engine.run()
    for request in requests:
        tokens = [*request.prompt, *request.completion.tokens]
        logits = target.model(torch.tensor([tokens], device=target.device)).logits[0].float()
        rows = logits[len(request.prompt) - 1 : -1]
        taken = rows.gather(1, torch.tensor(request.completion.tokens, device=rows.device)[:, None])[:, 0]
        assert (rows.max(dim=1).values - taken).max() < 0.01


def test_latent_attention_spreads_too(tmp_path):
    """DeepSeek's values are narrower than its keys, so that each layer copies the slots of its rows."""
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path / "target")
    layers = {f"model.layers.{i}": int(i >= 1) for i in range(len(model.model.layers))}
    spread = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1, **layers}
    one, two = (Target(load(tmp_path / "target", where)) for where in (0, spread))
    prompts = random_prompts(12, 5)
    want, got = (decode(target, None, prompts, max_new_tokens=12).completions for target in (one, two))
    assert [each.tokens for each in got] == [each.tokens for each in want]


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_it_trains_a_drafter_as_on_one_device(saved, tmp_path, loss):
    losses = []
    for where in (0, places()):
        target, drafter = pair(load(saved, where, torch.bfloat16))
        recipe = Recipe(steps=4, batch_size=4, anchors=4, learning_rate=1e-3, log_every=1, loss=loss)
        log = train_drafter(drafter.float().train(), target, Cycles(), tmp_path / str(len(losses)), recipe)
        losses.append(torch.tensor([entry["loss"] for entry in log if "loss" in entry]))
    assert len(losses[0]) == 4
    torch.testing.assert_close(losses[1], losses[0], atol=0.02, rtol=0.02)
