import json
from html.parser import HTMLParser

import pytest
from transformers import DiffusionGemmaForBlockDiffusion

from dflash_ext import models
from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from dflash_ext.models import Denoiser, Target
from python_tests.data.words import word_tokenizer
from python_tests.tiny import MASK_TOKEN, random_prompts

PROMPTS = random_prompts(5, 7, 9)


def texts(completions):
    return [word_tokenizer().decode(c.tokens, skip_special_tokens=True) for c in completions]


def test_a_diffusion_gemma_decodes_as_it_is(gemma, run):
    out = gemma / "out.jsonl"
    code, _, told = run(
        *("canvas", "--model", gemma / "gemma", "--prompts", gemma / "prompts.jsonl", "--max-new-tokens", 9),
        *("--steps", 3, "--entropy-bound", 6, "--t-max", 0.9, "--stability", 0, "--confidence", 2, "--output", out),
    )
    assert code == 0 and "tokens/s" in told
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(gemma / "gemma").eval()
    process = UniformDiffusion(steps=3, entropy_bound=6.0, t_max=0.9, stability=0, confidence=2.0)
    expected = decode_canvas(model, PROMPTS, process, max_new_tokens=9, stop_token_ids=[1, 2]).completions
    assert [row["text"] for row in rows] == texts(expected)
    assert [row["steps"] for row in rows] == [completion.steps for completion in expected]


@pytest.mark.parametrize(
    "options, process",
    [
        ([], MaskedDiffusion()),
        (["--schedule", "cosine", "--order", "left_to_right", "--steps", 3], None),
        (["--threshold", 0.1, "--temperature", 0.7, "--top-p", 0.9], None),
        (["--entropy-bound", 4, "--order", "entropy"], None),
    ],
)
def test_options_reach_the_process(workspace, run, denoiser, options, process):
    given = {
        "--schedule": MaskedDiffusion(schedule="cosine", order="left_to_right", steps=3),
        "--threshold": MaskedDiffusion(schedule=None, threshold=0.1, temperature=0.7, top_p=0.9),
        "--entropy-bound": MaskedDiffusion(schedule=None, entropy_bound=4.0, order="entropy"),
    }
    process = process or given[options[0]]
    out = workspace / "out.jsonl"
    code, _, told = run(
        *("canvas", *denoiser, "--prompts", workspace / "prompts.jsonl", "--max-new-tokens", 12, "--output", out),
        *("--canvas-length", 8, "--seed", 3, *options),
    )
    assert code == 0, told
    model = models.load_target(workspace / "target")[0]
    expected = decode_canvas(
        Denoiser(Target(model), MASK_TOKEN),
        PROMPTS,
        process,
        canvas_length=8,
        max_new_tokens=12,
        seed=3,
        stop_token_ids=[2],
    ).completions
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == texts(expected)


def test_one_prompt_is_streamed(workspace, run, denoiser):
    code, printed, told = run("canvas", *denoiser, "w005 w006 w007", "--max-new-tokens", 5, "--canvas-length", 2)
    assert code == 0 and printed.count("w") >= 3
    assert "tokens in" in told


class Cells(HTMLParser):
    """The kinds of tokens in each row of the page, and the text that was committed."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.committed, self.inside = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        kind = dict(attributes).get("class")
        if tag == "td":
            self.inside = kind
            (self.committed if kind == "committed" else self.rows).append("" if kind else [])
        elif tag == "span" and self.rows and self.inside is None and isinstance(self.rows[-1], list):
            self.rows[-1].append(kind)

    def handle_data(self, data):
        if self.inside == "committed":
            self.committed[-1] += data

    def handle_endtag(self, tag):
        if tag == "td":
            self.inside = "outside"


def test_the_trace_shows_each_step(workspace, run, denoiser):
    page = workspace / "trace.html"
    code, _, told = run(
        *("canvas", *denoiser, "w005 w006 w007", "--max-new-tokens", 8, "--canvas-length", 8, "--steps", 4),
        *("--trace", page),
    )
    assert code == 0, told
    parsed = Cells(page.read_text())
    assert [row.count("final") for row in parsed.rows] == [2, 4, 6, 8]
    assert [row.count("open") for row in parsed.rows] == [6, 4, 2, 0]
    assert len(parsed.committed) == 1 and parsed.committed[0].count("w") >= 4


def test_the_trace_of_uniform_diffusion_shows_what_was_replaced(gemma, run):
    page = gemma / "trace.html"
    options = ["--steps", 6, "--entropy-bound", 20, "--t-max", 2, "--t-min", 1, "--confidence", 0]
    code, _, told = run(
        "canvas", "--model", gemma / "gemma", "w005 w006 w007", "--max-new-tokens", 6, *options, "--trace", page
    )
    assert code == 0, told
    kinds = Cells(page.read_text()).rows
    assert len(kinds) == 6
    assert {kind for row in kinds for kind in row} == {"open", "final", "accepted"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--t-max", 1], "--t-max does not fit this model, which has a mask token"),
        (["--schedule", "square"], "schedule is 'square'"),
        (["--threshold", 0.5, "--schedule", "linear"], "schedule, threshold given"),
        (["--threshold", 1.5], "threshold is 1.5; a probability, from 0 to 1, is needed"),
    ],
)
def test_options_that_are_refused(run, denoiser, options, message):
    code, _, told = run("canvas", *denoiser, "w005", *options)
    assert code == 1 and message in told


def test_models_and_denoisers_must_fit(gemma, run):
    code, _, told = run("canvas", "--model", gemma / "gemma", "w005", "--order", "margin")
    assert code == 1 and "--order does not fit this model, which has no mask token" in told
    code, _, told = run("canvas", "--model", gemma / "gemma", "w005", "--denoiser", gemma / "drafter")
    assert code == 1 and "needs no --denoiser" in told
    code, _, told = run("canvas", "--model", gemma / "target", "w005")
    assert code == 1 and "name a denoiser that was trained for it" in told
