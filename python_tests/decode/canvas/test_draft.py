"""A denoiser of uniform noise drafts canvases, and its base verifies them."""

import pytest
import torch

from dflash_ext.decode import decode
from dflash_ext.decode.canvas import UniformDiffusion, decode_canvas
from dflash_ext.models import Adaptation, Denoiser, Target, UniformAdaptation, load_pair, save_adaptation
from dflash_ext.models.uniform import SelfConditioning
from dflash_ext.ops.random import derived, uniform_tokens
from python_tests.decode.canvas.models import tiny_denoiser
from python_tests.decode.oracle import own_outputs
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model

PROMPTS = random_prompts(5, 9, 3)


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    made = tiny_denoiser(mask_id=None)
    width = made.target.embedding_size
    conditioning = SelfConditioning(width, 2 * width).requires_grad_(False)
    torch.nn.init.normal_(conditioning.down.weight, std=0.5)
    return Denoiser(made.target, self_conditioning=conditioning)


def noise_at(first: int, step: int, vocab_size: int) -> torch.Tensor:
    """The random tokens that a step reads at four positions from `first` on, with the seed 7."""
    return uniform_tokens(derived(torch.tensor(7), step) + first + torch.arange(4), vocab_size)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_greedy_token_changes(steps):
    target, drafter = Target(tiny_model("llama")), denoiser()
    expected = own_outputs(target.model, PROMPTS, 20)
    for block_size in (2, 3, 8, "auto"):
        options = dict(max_new_tokens=20, denoising_steps=steps, block_size=block_size, batch_size=2)
        decoded = decode(target, drafter, PROMPTS, **options)
        assert [c.tokens for c in decoded.completions] == expected


def test_a_draft_is_a_canvas_behind_the_anchor():
    """In every cycle: what earlier cycles committed is in the denoiser's cache. A second step draws something else."""
    drafter, options = denoiser(), dict(max_new_tokens=16, block_size=5, seed=[7, 7, 7])
    target = drafter.target
    drafts = []
    for steps in (1, 2):
        decoded = decode(target, drafter, PROMPTS, denoising_steps=steps, **options)
        drafts.append([completion.drafted for completion in decoded.completions])
    for prompt, completion in zip(PROMPTS, decode(target, drafter, PROMPTS, **options).completions, strict=True):
        known = 1
        for drafted, accepted in zip(completion.drafted, completion.accepted, strict=True):
            context = [*prompt, *completion.tokens[:known]]
            noise = noise_at(len(context), 0, target.vocab_size).tolist()
            process = UniformDiffusion(steps=1)
            canvas = decode_canvas(
                drafter, [context], process, canvas_length=4, max_new_tokens=4, canvases=[noise]
            ).completions[0]
            assert canvas.tokens[: len(drafted)] == drafted
            known += accepted + 1
    assert drafts[0] != drafts[1]


def dense_logits(drafter: Denoiser, context: list[int], canvas: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The logits of a canvas by the model's own attention under a dense mask: [L, V]."""
    model, known = drafter.target.model, len(context)
    ids = torch.tensor([[*context, *canvas.tolist()]])
    embedded = model.get_input_embeddings()(ids)
    embedded[:, known:] = drafter.self_conditioning(embedded[:, known:], soft[None])
    sees = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    sees[known:] = True
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    return model(inputs_embeds=embedded, attention_mask=mask).logits[0, known:]


@torch.no_grad()
def test_a_second_step_reads_what_the_first_was_sure_of_and_what_it_expected():
    drafter = denoiser()
    target, options = drafter.target, dict(max_new_tokens=16, block_size=5, seed=[7, 7, 7])
    target.model.set_attn_implementation("eager")
    for completion, prompt in zip(
        decode(target, drafter, PROMPTS, denoising_steps=2, **options).completions, PROMPTS, strict=True
    ):
        known = 1
        for drafted, accepted in zip(completion.drafted, completion.accepted, strict=True):
            context = [*prompt, *completion.tokens[:known]]
            noise = [noise_at(len(context), step, target.vocab_size) for step in range(2)]
            first = dense_logits(drafter, context, noise[0], torch.zeros(4, target.embedding_size))
            soft = first.softmax(-1) @ target.model.get_input_embeddings().weight
            entropy = torch.distributions.Categorical(logits=first).entropy()
            before = entropy.sort()[0].cumsum(0) - entropy.sort()[0]
            kept = entropy <= entropy.sort()[0][before <= 0.1].max()
            second = dense_logits(drafter, context, first.argmax(-1).where(kept, noise[1]), soft)
            assert second.argmax(-1).tolist()[: len(drafted)] == drafted
            known += accepted + 1


def test_the_folder_of_a_denoiser_is_that_of_a_drafter(tmp_path):
    target = Target(tiny_model("llama"))
    save_adaptation(UniformAdaptation.for_target(target, mask_id=None), tmp_path)
    _, drafter = load_pair(target.model, tmp_path)
    assert isinstance(drafter, Denoiser)
    decoded = decode(target, tmp_path, PROMPTS, max_new_tokens=6)
    assert [c.tokens for c in decoded.completions] == own_outputs(target.model, PROMPTS, 6)


def test_a_denoiser_that_holds_no_lora_drafter_is_named(tmp_path):
    target = Target(tiny_model("llama"))
    for kind in ("full", "whole"):
        save_adaptation(Adaptation.for_target(target, mask_id=MASK_TOKEN, kind=kind), tmp_path / kind)
        (tmp_path / kind / "lora_drafter.json").unlink(missing_ok=kind == "full")
        with pytest.raises(ValueError, match=rf"no drafter in '.*{kind}': .* there is no lora_drafter.json"):
            load_pair(target.model, tmp_path / kind)


def test_what_is_refused():
    target = Target(tiny_model("llama"))
    with pytest.raises(ValueError, match="drafts as the LoRA drafter in its folder"):
        decode(target, tiny_denoiser(), PROMPTS, max_new_tokens=4)
    with pytest.raises(ValueError, match="block size 1 is not supported: this drafter fills blocks of 2 to 64 slots"):
        decode(target, denoiser(), PROMPTS, max_new_tokens=4, block_size=1)
