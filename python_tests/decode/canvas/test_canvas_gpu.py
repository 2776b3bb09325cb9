"""Canvases on a GPU: graphs replayed over changing lengths and rows, in bfloat16."""

import pytest
import torch

from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from dflash_ext.decode.canvas.forward import canvas_forward
from dflash_ext.decode.canvas.graphs import Runner
from dflash_ext.models import Denoiser, DFlashDrafter, Target
from dflash_ext.models.uniform import SelfConditioning
from python_tests.decode.canvas.models import tiny_diffusion_gemma
from python_tests.decode.test_engine_gpu import SHAPES
from python_tests.integrations.test_attention import model_of
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model

pytestmark = pytest.mark.gpu

MASKED = MaskedDiffusion(steps=3)
LIMITED = MaskedDiffusion(schedule=None, threshold=0.2)
UNIFORM = UniformDiffusion(steps=5, entropy_bound=6.0, stability=0, confidence=3.0)


def denoiser(family):
    model = tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16)
    return Denoiser(Target(model), mask_id=MASK_TOKEN)


def conditioned(model, **options):
    """A denoiser of uniform noise, with weights that are large enough for its tokens to differ."""
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.06)
    width = model.config.hidden_size
    conditioning = SelfConditioning(width, 2 * width).to("cuda", torch.bfloat16).requires_grad_(False)
    torch.nn.init.normal_(conditioning.down.weight, std=0.2)
    return Denoiser(Target(model), self_conditioning=conditioning, **options)


def uniform(family):
    return conditioned(tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16))


def gated(family):
    """One whose prompts another model reads."""
    model, other = (tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16) for _ in range(2))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(1.5)
    return conditioned(model, encoder=Target(other))


def with_modules():
    """Gemma 4, for which the engine has no forward of its own."""
    model = model_of("gemma4").requires_grad_(False).to("cuda", torch.bfloat16)
    return Denoiser(Target(model), mask_id=MASK_TOKEN)


def new_mask_token():
    """One whose mask token is none of the vocabulary, so that only its own embedding stands for it."""
    model = tiny_model("llama", **SHAPES["llama"]).to("cuda", torch.bfloat16)
    embedding = torch.ones(model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    return Denoiser(Target(model), mask_id=model.config.vocab_size, mask_embedding=embedding)


def diffusion_gemma():
    return tiny_diffusion_gemma().to("cuda", torch.bfloat16)


CASES = {
    "llama": (lambda: denoiser("llama"), MASKED),
    "gemma3": (lambda: denoiser("gemma3"), LIMITED),
    "gemma4": (with_modules, MASKED),
    "new mask token": (new_mask_token, MASKED),
    "diffusion_gemma": (diffusion_gemma, UNIFORM),
    "uniform, llama": (lambda: uniform("llama"), UNIFORM),
    "uniform, gemma3": (lambda: uniform("gemma3"), UNIFORM),
    "gated, llama": (lambda: gated("llama"), UNIFORM),
}


def first_guesses(denoiser):
    """A drafter of canvases of six tokens."""
    options = dict(mask_token_id=MASK_TOKEN, num_layers=2, block_size=7, taps=3)
    return DFlashDrafter.for_target(denoiser.reader, **options).to("cuda", torch.bfloat16).eval()


def plainly(self, name, slots):
    """What a replay does, without a graph."""
    size = next(size for size in self.sizes if size >= len(slots))
    filled = [*slots, *[self.cycle.spare] * (size - len(slots))]
    getattr(self.cycle, name)(torch.tensor(filled, device="cuda"))


GUESSED = [case for case in CASES if "," in case]  # drafts are for uniform-state diffusion of a causal LM


@pytest.mark.parametrize(("case", "guesses"), [*((case, False) for case in CASES), *((case, True) for case in GUESSED)])
def test_graphs_give_the_tokens_of_plain_calls(case, guesses, monkeypatch):
    """Prompts of unequal lengths in turns, canvases that are done at different steps, and rows that come and go."""
    make, process = CASES[case]
    options = dict(max_new_tokens=40, batch_size=3, canvas_length=6, seed=4)
    prompts = random_prompts(300, 4, 31, 1, 60, 17)
    if guesses:
        options["drafter"] = first_guesses(make())
        noise = decode_canvas(make(), prompts, process, **options | {"drafter": None})
    graphed = decode_canvas(make(), prompts, process, **options)
    monkeypatch.setattr(Runner, "__call__", plainly)
    plain = decode_canvas(make(), prompts, process, **options)
    assert [c.tokens for c in graphed.completions] == [c.tokens for c in plain.completions]
    assert [c.steps for c in graphed.completions] == [c.steps for c in plain.completions]
    assert all(c.finish_reason == "length" for c in graphed.completions)
    assert not guesses or [c.tokens for c in graphed.completions] != [c.tokens for c in noise.completions]


def test_one_graph_serves_prompts_of_any_length(monkeypatch):
    captured = []
    capture = Runner._capture
    monkeypatch.setattr(Runner, "_capture", lambda self, f, size: captured.append(f.__name__) or capture(self, f, size))
    prompts = random_prompts(300, 1, 31, 7)
    decode_canvas(diffusion_gemma(), prompts, UNIFORM, max_new_tokens=12, batch_size=1)
    assert sorted(captured) == ["extend", "step"]


@torch.no_grad()
def test_logits_are_as_exact_as_those_of_transformers():
    """Of a canvas behind a prompt that is longer than the window, against the same weights in float32."""
    model = diffusion_gemma()
    exact = tiny_diffusion_gemma()
    exact.load_state_dict({name: x.float().cpu() for name, x in model.state_dict().items()})
    prompt, canvas = (torch.tensor(random_prompts(n)) for n in (40, 6))
    expected = exact(prompt, decoder_input_ids=canvas).logits
    model.set_attn_implementation("sdpa")
    theirs = model(prompt.cuda(), decoder_input_ids=canvas.cuda()).logits
    forward = canvas_forward(model, slots=2, tokens=64, rows=64)
    start, none, slot = torch.tensor([40]).cuda(), torch.tensor([0]).cuda(), torch.zeros(1, dtype=torch.int32).cuda()
    forward.encode(prompt.cuda(), torch.arange(40)[None].cuda(), none, start, slot)
    soft = torch.zeros(1, 6, forward.like.shape[1], dtype=torch.bfloat16).cuda()
    positions = 40 + torch.arange(6)[None].cuda()
    ours = forward.denoise(canvas.cuda(), positions, start, torch.tensor([6]).cuda(), slot, soft)
    errors = [(logits.cpu().float() - expected).pow(2).mean().sqrt() for logits in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1], errors
