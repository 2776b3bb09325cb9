"""Training steps as CUDA graphs."""

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from dflash_ext.data import NoiseCollator
from dflash_ext.models import Target
from dflash_ext.train import LoraRecipe, Recipe, RunRecipe, graphs, new_drafter, new_lora_drafter, train_drafter
from python_tests.tiny import MASK_TOKEN, tiny_model
from python_tests.train.test_denoisers import COLLATOR
from python_tests.train.test_denoisers import train as train_denoiser_of
from python_tests.train.test_training import Cycles

# Every shape of batch comes several times: once as it is, once to be recorded, and then as a replay.
SETTINGS = {"steps": 12, "batch_size": 3, "anchors": 3, "learning_rate": 1e-2, "log_every": 1}


def losses(folder, device, *, drafter=None, **settings) -> list[float]:
    target = Target(tiny_model("llama").to(device, torch.bfloat16 if device == "cuda" else torch.float32))
    options = dict(mask_token_id=MASK_TOKEN, block_size=4, rank=4) | (drafter or {})
    trained = new_lora_drafter(target, 0, **options)
    log = train_drafter(trained, target, Cycles(24), folder, LoraRecipe(**SETTINGS | settings))
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "drafter, settings",
    [
        ({}, {}),
        ({"sampler_width": 8}, {"optimizer": "adamw", "accumulation": 2, "kl_weight": 0.5, "noise_ratio": 0.8}),
        ({"kind": "whole", "causal": True}, {"checkpoint_activations": True}),
    ],
)
def test_replayed_steps_have_the_losses_of_steps_that_are_launched(drafter, settings, tmp_path):
    plain = losses(tmp_path / "plain", "cuda", drafter=drafter, **settings)
    replayed = losses(tmp_path / "graphs", "cuda", drafter=drafter, cuda_graphs=True, **settings)
    assert plain[-1] < 0.99 * plain[0]
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(plain), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family, options, settings",
    [
        ("llama", {}, {"accumulation": 2}),
        ("gemma4", {"kl_weight": 0.5}, {"checkpoint_activations": True}),
        ("gemma3", {"pattern": "block_causal", "collator": NoiseCollator(COLLATOR.noise, block_size=4)}, {}),
        ("gemma3", {}, {"compile": True}),
    ],
)
def test_replayed_steps_of_denoisers_have_the_losses_of_steps_that_are_launched(family, options, settings, tmp_path):
    logs = []
    for graphed in (False, True):
        torch._dynamo.reset()
        recipe = RunRecipe(steps=12, batch_size=4, learning_rate=2e-2, log_every=1, cuda_graphs=graphed, **settings)
        _, log = train_denoiser_of(tmp_path / str(graphed), recipe, family=family, device="cuda", **options)
        logs.append(torch.tensor([entry["loss"] for entry in log if "loss" in entry]))
    assert logs[0][-3:].sum() < 0.95 * logs[0][:3].sum()
    torch.testing.assert_close(logs[1], logs[0], rtol=0.02, atol=0.02)


def test_what_cannot_run_as_graphs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cuda_graphs is for LoRA drafters, and for denoisers"):
        losses(tmp_path, "cpu", cuda_graphs=True)
    target = Target(tiny_model("llama"))
    drafter = new_drafter(target, 0, mask_token_id=MASK_TOKEN, block_size=4, num_layers=1, taps=1)
    tapped = Target(target.model, drafter.config.target_layer_ids)
    with pytest.raises(ValueError, match="cuda_graphs is for LoRA drafters, and for denoisers"):
        train_drafter(drafter, tapped, Cycles(24), tmp_path, Recipe(**SETTINGS, cuda_graphs=True))
    with pytest.raises(ValueError, match="without ar_weight"):
        train_denoiser_of(tmp_path, RunRecipe(steps=1, cuda_graphs=True), ar_weight=0.1)


class Replay:
    """A graph for a CPU: it runs the passes again, and writes what they give where the recorded ones wrote it."""

    def replay(self):
        kept = [parameter.grad for parameter in self.recorded.parameters]
        for parameter in self.recorded.parameters:
            parameter.grad = None
        results = self.passes(self.recorded.batch, self.recorded.divisor)
        for static, new in zip(self.recorded.results, results, strict=True):
            static.data.copy_(new)
        for static, parameter, before in zip(self.recorded.gradients, self.recorded.parameters, kept, strict=True):
            static.copy_(parameter.grad)
            parameter.grad = before


def test_replays_add_to_gradients_as_passes_do(monkeypatch):
    calls = []

    def passes(batch, divisor):
        calls.append(batch["x"].shape)
        loss = (weight * batch["x"]).sum() ** 2 / divisor
        loss.backward()
        return loss.detach(), batch["x"].sum()

    class Recorded(graphs._Recorded):
        def __init__(self, *given):
            super().__init__(*given)
            self.graph.recorded, self.graph.passes = self, passes

    monkeypatch.setattr(graphs, "_Recorded", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replay)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    weight = torch.ones(3, requires_grad=True)
    graphed = graphs.GraphedPasses(passes, [weight])
    batches = [{"x": torch.rand(rows, 3)} for rows in (2, 4, 2, 2, 4, 4, 2, 2)]
    for step in (batches[:1], batches[1:4], batches[4:6], batches[6:]):
        weight.grad = None
        for batch in step:
            passes(batch, torch.tensor(3.0))
        expected, weight.grad = weight.grad, None
        for batch in step:
            loss, total = graphed(batch, torch.tensor(3.0))
            assert loss == (weight * batch["x"]).sum() ** 2 / 3 and total == batch["x"].sum()
        torch.testing.assert_close(weight.grad, expected)
