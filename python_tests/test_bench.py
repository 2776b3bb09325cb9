"""What the benches of the engine measure is the engine: rows that stand at a context, and move on."""

import pytest
import torch

from bench import answers
from bench.engine_models import bytes_of, loaded, replay
from dflash_ext.models import DFlashDrafter, LoraDrafter, Target
from dflash_ext.ops.cycle import FIELDS
from python_tests.tiny import MASK_TOKEN, tiny_model


@torch.no_grad()
def test_a_loaded_engine_moves_on_from_its_context():
    model = tiny_model("qwen3", max_position_embeddings=1024)
    options = dict(mask_token_id=MASK_TOKEN, num_layers=2, block_size=6, taps=3)
    drafter = DFlashDrafter.for_target(Target(model), **options).eval()
    target = Target(model, drafter.config.target_layer_ids)
    for draft in (None, drafter):
        engine = loaded(target, draft, 3, 40)
        before = engine.state.numbers[list(engine.rows), FIELDS.index("start")].clone()
        assert before.tolist() == [40] * 3
        records = replay(engine, 3)()
        assert records[:, 0].tolist() == [1] * 3 and records.shape == (3, 4 + (5 if draft else 0))
        after = engine.state.numbers[list(engine.rows), FIELDS.index("start")]
        assert (after > before).all()
    assert bytes_of(target, drafter, 3, 40) > bytes_of(target, None, 3, 40) > bytes_of(target, None, 1, 40)


@torch.no_grad()
@pytest.mark.parametrize("kind, forwards, drafted", [("gated", 1, 4), ("gated", 2, 5), ("whole", None, 5)])
def test_a_loaded_engine_with_a_lora_drafter(kind, forwards, drafted):
    target = Target(tiny_model("qwen3", max_position_embeddings=1024))
    drafter = LoraDrafter.for_target(target, mask_token_id=MASK_TOKEN, rank=2, block_size=6, kind=kind)
    engine = loaded(target, drafter.eval(), 2, 40, forwards=forwards)
    run = replay(engine, 2)
    for _ in range(2):
        records = run()
        assert records[:, 0].tolist() == [1] * 2 and records.shape == (2, 4 + drafted)
        assert records[:, 1].tolist() == [drafted] * 2  # a cycle of one forward has a draft to verify


def test_a_queue_of_prompts_is_answered_whole(monkeypatch):
    monkeypatch.setattr(answers, "PROMPT", (2, 9))
    monkeypatch.setattr(answers, "ANSWER", (3, 12))
    target = Target(tiny_model("llama"))
    asked = answers.requests(21, target.vocab_size)
    assert len({tokens for _, tokens in asked}) > 3 and max(len(prompt) for prompt, _ in asked) <= 9
    row = answers.measure(target, 4, 20, at_once=True)
    seconds = sum(tokens for _, tokens in asked[1:]) / row["tokens_per_second"]
    assert row["host"].keys() == {"prefill", "cycle", "read"} and 0 < sum(row["host"].values()) < seconds
