"""Points of quality and speed are those of the tokens that the canvas loop and the base decode."""

import math

import pytest

from dflash_ext.decode import decode
from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from dflash_ext.eval.canvas_front import BASE, canvas_front, figures, plot_front, table
from dflash_ext.eval.metrics import answer_nll, bigram_repetition
from python_tests.data.words import word_tokenizer
from python_tests.decode.canvas.models import CANVAS, tiny_denoiser, tiny_diffusion_gemma
from python_tests.tiny import random_prompts

PROMPTS = random_prompts(5, 9)
OPTIONS = dict(max_new_tokens=2 * CANVAS, seed=1)


@pytest.fixture(scope="module")
def points():
    denoiser = tiny_denoiser()
    processes = {"2 steps": MaskedDiffusion(steps=2), "6 steps": MaskedDiffusion(steps=6)}
    return denoiser, canvas_front(
        denoiser, denoiser.target, word_tokenizer(), PROMPTS, processes, canvas_length=CANVAS, **OPTIONS
    )


def test_points_are_those_of_the_tokens(points):
    denoiser, found = points
    assert list(found) == ["2 steps", "6 steps", BASE]
    decoded = decode_canvas(denoiser, PROMPTS, MaskedDiffusion(steps=2), canvas_length=CANVAS, **OPTIONS)
    answers = [completion.tokens for completion in decoded.completions]
    point = found["2 steps"]
    assert point.answers == [word_tokenizer().decode(tokens, skip_special_tokens=True) for tokens in answers]
    assert point.nll == pytest.approx(sum(answer_nll(denoiser.target, PROMPTS, answers)) / 2)
    assert point.repetition == pytest.approx(sum(map(bigram_repetition, answers)) / 2)
    assert (point.tokens_per_forward, found["6 steps"].tokens_per_forward) == (CANVAS / 2, CANVAS / 6)
    assert all(each.tokens_per_second > 0 for each in found.values())


def test_the_base_is_decoded_beside_them(points):
    denoiser, found = points
    plain = decode(denoiser.target, None, PROMPTS, temperature=1.0, **OPTIONS)
    answers = [completion.tokens for completion in plain.completions]
    assert found[BASE].nll == pytest.approx(sum(answer_nll(denoiser.target, PROMPTS, answers)) / 2)


def test_a_table_and_a_plot(points, tmp_path):
    _, found = points
    assert table(found).row_count == 3
    plot_front(found, tmp_path / "front.svg")
    assert "6 steps" in (tmp_path / "front.svg").read_text()


def test_without_a_base_there_is_no_likelihood(tmp_path):
    process = {"3 steps": UniformDiffusion(steps=3)}
    found = canvas_front(tiny_diffusion_gemma(), None, word_tokenizer(), PROMPTS, process, **OPTIONS)
    assert math.isnan(found["3 steps"].nll) and figures(found)["3 steps"]["nll"] is None
    plot_front(found, tmp_path / "front.png")
