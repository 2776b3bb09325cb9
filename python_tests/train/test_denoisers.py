"""Training of denoisers: what it learns, and that a resumed run is the same run."""

import pytest
import torch
from safetensors.torch import load_file

from dflash_ext.data import DataError, NoiseCollator, TextDataset
from dflash_ext.models import Adaptation, load_adaptation
from dflash_ext.noise import MaskNoise, Share
from dflash_ext.train import RunRecipe, train_denoiser
from python_tests.data.words import word_tokenizer
from python_tests.models.test_adaptation import target_of
from python_tests.tiny import MASK_TOKEN

COLLATOR = NoiseCollator(MaskNoise(Share(0.25, 0.25), 2))


def text(documents=24, length=32):
    """Documents that go up or down by one from word to word, from different words on."""
    rows = [[3 + (7 * i + (j if i % 2 else -j)) % 20 for j in range(10 + i % 7)] for i in range(documents)]
    return TextDataset([" ".join(f"w{word:03}" for word in row) for row in rows], word_tokenizer(), length)


def train(
    folder,
    recipe,
    *,
    family="llama",
    attention="block_attn",
    pattern="prefix_block",
    kind="whole",
    collator=COLLATOR,
    device="cpu",
    **options,
):
    block_size = collator.block_size if pattern == "block_causal" else None
    target = target_of(family)
    target.decoder.set_attn_implementation(attention)
    # With the small weights of a new model, no hidden state gives a token much more than the others.
    torch.nn.init.normal_(target.head, std=0.3, generator=torch.Generator().manual_seed(0))
    target.model.to(device)
    made = dict(mask_id=MASK_TOKEN, pattern=pattern, block_size=block_size, kind=kind, rank=8)
    adaptation = Adaptation.for_target(target, **made)
    return adaptation, train_denoiser(adaptation, text(), folder, recipe, collator=collator, **options)


@pytest.mark.parametrize(
    ("family", "pattern", "options", "weights"),
    [
        ("llama", "causal", {}, {}),
        ("gemma4", "prefix_block", {"complementary": True}, {"ar_weight": 0.2}),
        ("llama", "prefix_block", {"inverse_rate": True, "prefix": Share(0.1, 0.6)}, {"kl_weight": 0.1}),
        ("gemma4", "block_causal", {"block_size": 4}, {"ar_weight": 0.2, "kl_weight": 0.1}),
    ],
)
def test_every_pattern_and_loss_learns(tmp_path, family, pattern, options, weights):
    collator = NoiseCollator(COLLATOR.noise, **options)
    recipe = RunRecipe(steps=10, batch_size=4, learning_rate=2e-2, log_every=1)
    adaptation, log = train(tmp_path, recipe, family=family, pattern=pattern, collator=collator, **weights)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    saved = load_adaptation(tmp_path, adaptation.target)
    for name, tensor in adaptation.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name


def test_the_best_on_held_out_text_is_kept(tmp_path):
    recipe = RunRecipe(steps=4, batch_size=4, learning_rate=2e-2, evaluate_every=2, log_every=1)
    _, log = train(tmp_path, recipe, held_out=text().first(5))
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    assert all(0 <= entry["eval_accuracy"] <= 1 for entry in evaluations)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(("kind", "killed_after"), [("whole", 5), ("gated", 3), ("full", 3)])
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(tmp_path, kind, killed_after):
    recipe = RunRecipe(steps=6, batch_size=2, accumulation=2, learning_rate=1e-2, save_every=2, log_every=1)

    def run(folder, interrupt_at=None, **options):
        calls = []
        adaptation = Adaptation.for_target(target_of("llama"), mask_id=MASK_TOKEN, rank=4, kind=kind)

        def count(*_):
            calls.append(1)
            if len(calls) == interrupt_at:
                raise Interrupt

        adaptation.register_forward_hook(count)
        return train_denoiser(adaptation, text(), folder, recipe, collator=COLLATOR, kl_weight=0.1, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupt):
        run(tmp_path / "cut", interrupt_at=2 * killed_after)
    resumed = run(tmp_path / "cut", resume=True)
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    for name in (weights, "denoiser.safetensors"):
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    first, again = ([entry["loss"] for entry in log if "loss" in entry] for log in (whole, resumed))
    assert first == again


@pytest.mark.parametrize("kind", ["gated", "full"])
def test_every_kind_learns_and_leaves_nothing_of_another_kind(tmp_path, kind):
    recipe = RunRecipe(steps=15, batch_size=4, learning_rate=2e-2 if kind == "gated" else 2e-3, log_every=1)
    train(tmp_path, RunRecipe(steps=1, batch_size=4), kind="whole" if kind == "full" else "full")
    adaptation, log = train(tmp_path, recipe, kind=kind, overwrite=True)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    saved = load_adaptation(tmp_path, adaptation.target)
    assert saved.config.kind == kind
    for name, tensor in adaptation.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    assert (tmp_path / "model.safetensors").exists() == (kind == "full")
    assert (tmp_path / "lora_drafter.json").exists() == (kind == "gated")


def test_a_checkpoint_of_another_denoiser_is_refused(tmp_path):
    recipe = RunRecipe(steps=2, batch_size=2, save_every=1)
    train(tmp_path, recipe)
    with pytest.raises(ValueError, match="pattern"):
        train(tmp_path, recipe, pattern="causal", resume=True)


@pytest.mark.parametrize(
    "change", [{"kl_weight": 0.5}, {"ar_weight": 0.5}, {"collator": NoiseCollator(COLLATOR.noise, Share(0.2, 0.8))}]
)
def test_a_checkpoint_of_other_options_is_refused(tmp_path, change):
    recipe = RunRecipe(steps=1, batch_size=2, save_every=1)
    train(tmp_path, recipe)
    name = next(iter(change)).replace("collator", "prefix")
    with pytest.raises(ValueError, match=f"of a training with other options: its {name} is"):
        train(tmp_path, recipe, resume=True, **change)


def test_causal_and_bidirectional_denoisers_see_the_same_batches(tmp_path):
    """The accuracy of the first step differs by the mask alone: the batches and the first weights are the same."""
    recipe = RunRecipe(steps=1, batch_size=4, log_every=1)
    batches = []
    for pattern in ("causal", "prefix_block"):
        seen = []

        class Recorded(NoiseCollator):
            def __call__(self, samples, seen=seen):
                seen.append(super().__call__(samples))
                return seen[-1]

        train(tmp_path / pattern, recipe, pattern=pattern, collator=Recorded(COLLATOR.noise))
        batches.append(seen[0])
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_rows_longer_than_the_model(tmp_path):
    adaptation = Adaptation.for_target(target_of("llama"), mask_id=MASK_TOKEN)
    with pytest.raises(ValueError, match="rows of 600 tokens do not fit: the target has 512 positions"):
        train_denoiser(adaptation, text(60, 600), tmp_path, RunRecipe(steps=1), collator=COLLATOR)


def test_text_without_a_document_to_denoise(tmp_path):
    adaptation = Adaptation.for_target(target_of("llama"), mask_id=MASK_TOKEN)
    lone = TextDataset(["w005"] * 40, word_tokenizer(), 32)
    for rows, held_out in ((lone, None), (text(), lone)):
        with pytest.raises(DataError, match="there is nothing to denoise"):
            train_denoiser(adaptation, rows, tmp_path, RunRecipe(steps=1), collator=COLLATOR, held_out=held_out)


@pytest.mark.parametrize(
    "family, attention, kind",
    [
        ("llama", "block_attn", "whole"),
        ("gemma4", "block_attn", "gated"),
        ("gemma4", "sdpa", "whole"),
        ("gemma4", "block_attn", "full"),
    ],
)
def test_layers_computed_again_give_the_same_run(tmp_path, family, attention, kind):
    losses = []
    for again in (False, True):
        recipe = RunRecipe(steps=3, batch_size=2, learning_rate=1e-2, log_every=1, checkpoint_activations=again)
        _, log = train(tmp_path / str(again), recipe, family=family, attention=attention, kind=kind, kl_weight=0.1)
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
