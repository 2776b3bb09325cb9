"""What the benches of the engine measure is the engine: rows that stand at a context, and move on."""

import torch

from bench.engine_models import bytes_of, loaded, replay
from dflash_ext.models import DFlashDrafter, Target
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
