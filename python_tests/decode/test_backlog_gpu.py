"""What cycles leave for the next draft, in CUDA graphs and in bfloat16."""

import pytest
import torch

from dflash_ext.decode import Engine
from dflash_ext.decode.graphs import GraphRunner
from dflash_ext.decode.pace import Pace
from dflash_ext.models import Denoiser, Target
from python_tests.decode.test_backlog import CHOICES, MOST, expect_caches, shorten
from python_tests.decode.test_engine_gpu import SHAPES, pair
from python_tests.decode.test_lora_drafters_gpu import pair as lora_pair
from python_tests.tiny import random_prompts, tiny_model

pytestmark = pytest.mark.gpu


def canvas_pair():
    models = [tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16) for family in ("llama", "qwen3")]
    return Target(models[0]), Denoiser(Target(models[1]), mask_id=None)


PAIRS = {
    "features": lambda: pair("qwen3"),
    "whole": lambda: lora_pair("llama", "whole")[:2],
    "canvas": canvas_pair,
}


@torch.no_grad()
@pytest.mark.parametrize("most", [MOST, None])
@pytest.mark.parametrize("kind", PAIRS)
def test_graphs_leave_what_a_draft_needs(kind, most, monkeypatch):
    """The host neither waits for the device when it catches up, nor knows at once which rows have ended."""
    if most is not None:
        shorten(monkeypatch, most)
    prompts = random_prompts(3, 9, 270, 17, 2, 30)
    lengths = [150, 260, 90, 33, 200, 70]

    def engine(drafting: bool = True, slots: int = 3) -> Engine:
        target, drafter = PAIRS[kind]()
        how = dict(block_size="auto", costs={1: {0: 1e-3, 5: 1e-3, 7: 1e-3}}) if drafting else {}
        return Engine(target, drafter if drafting else None, slots=slots, max_length=400, exact=True, **how)

    plain = engine(drafting=False)
    expected = [plain.submit(prompt, max_new_tokens=n) for prompt, n in zip(prompts, lengths, strict=True)]
    plain.run()
    mine = engine()
    assert isinstance(mine.runner, GraphRunner)
    own, caught_up = mine.cycle.draft.catch_up, []

    def catch_up(*given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            own(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        caught_up.append(given[1])

    monkeypatch.setattr(mine.cycle.draft, "catch_up", catch_up)
    for _ in range(2):  # the second time there are graphs
        choices = iter(CHOICES * 99)
        monkeypatch.setattr(Pace, "choose", lambda self, *given, choices=choices: self.widths[next(choices)])
        requests = [mine.submit(prompt, max_new_tokens=n) for prompt, n in zip(prompts, lengths, strict=True)]
        answers = {request: r.completion.tokens for request, r in zip(requests, expected, strict=True)}
        checked, steps = 0, 0
        while mine.step():
            steps += 1
            if steps % 40 == 0:
                checked += expect_caches(mine, answers, lambda: engine(slots=1), tolerance=0.1)
        assert [request.completion.tokens for request in requests] == list(answers.values())
        assert checked > 3
    assert any(caught_up) and any(width == 0 for *_, width in mine.runner.graphs)
