"""Points of quality and speed are those of the tokens that the canvas loop and the base decode."""

import pytest

from dflash_ext.decode import decode
from dflash_ext.decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from dflash_ext.eval.canvas_front import BASE, Judged, base_points, canvas_points, figures, plot_front, table
from dflash_ext.eval.metrics import answer_nll, bigram_repetition, last_number
from python_tests.data.words import word_tokenizer
from python_tests.decode.canvas.models import CANVAS, tiny_denoiser, tiny_diffusion_gemma
from python_tests.tiny import random_prompts

PROMPTS = random_prompts(5, 9)
OPTIONS = dict(max_new_tokens=2 * CANVAS, seed=1)


@pytest.fixture(scope="module")
def points():
    denoiser = tiny_denoiser()
    processes = {"2 steps": MaskedDiffusion(steps=2), "6 steps": MaskedDiffusion(steps=6)}
    judged = Judged(PROMPTS, word_tokenizer(), denoiser.target, **OPTIONS)
    return denoiser, canvas_points(denoiser, judged, processes, canvas_length=CANVAS) | base_points(judged)


def test_points_are_those_of_the_tokens(points):
    denoiser, found = points
    assert list(found) == ["2 steps", "6 steps", BASE]
    decoded = decode_canvas(denoiser, PROMPTS, MaskedDiffusion(steps=2), canvas_length=CANVAS, **OPTIONS)
    answers = [completion.tokens for completion in decoded.completions]
    point = found["2 steps"]
    assert point.answers == [word_tokenizer().decode(tokens, skip_special_tokens=True) for tokens in answers]
    assert point.nll.mean == pytest.approx(sum(answer_nll(denoiser.target, PROMPTS, answers)) / 2)
    assert point.repetition == pytest.approx(sum(map(bigram_repetition, answers)) / 2)
    assert (point.tokens_per_forward, found["6 steps"].tokens_per_forward) == (CANVAS / 2, CANVAS / 6)
    assert all(each.tokens_per_second > 0 for each in found.values())


def test_the_base_is_decoded_beside_them(points):
    denoiser, found = points
    plain = decode(denoiser.target, None, PROMPTS, temperature=1.0, **OPTIONS)
    answers = [completion.tokens for completion in plain.completions]
    assert found[BASE].nll.mean == pytest.approx(sum(answer_nll(denoiser.target, PROMPTS, answers)) / 2)


def test_a_table_and_a_plot(points, tmp_path):
    _, found = points
    assert table(found).row_count == 3
    plot_front(found, tmp_path / "front.svg")
    drawn = (tmp_path / "front.svg").read_text()
    assert all(f"<!-- {words} -->" in drawn for words in ("2 steps", "6 steps", "canvases", BASE))


def test_without_a_base_there_is_no_likelihood(tmp_path):
    process = {"3 steps": UniformDiffusion(steps=3)}
    judged = Judged(PROMPTS, word_tokenizer(), **OPTIONS)
    found = canvas_points(tiny_diffusion_gemma(), judged, process) | base_points(judged)
    assert list(found) == ["3 steps"]
    assert found["3 steps"].nll is None and figures(found)["3 steps"]["nll"] is None
    plot_front(found, tmp_path / "front.png")


def test_right_answers_are_those_with_the_last_number_of_the_reference():
    denoiser = tiny_denoiser()
    process = {"2 steps": MaskedDiffusion(steps=2)}
    plain = Judged(PROMPTS, word_tokenizer(), **OPTIONS)
    answers = canvas_points(denoiser, plain, process, canvas_length=CANVAS)["2 steps"].answers
    assert any(last_number(answer) is not None for answer in answers)
    told = Judged(PROMPTS, word_tokenizer(), references=[f"#### {answers[0]}", "no number"], **OPTIONS)
    point = canvas_points(denoiser, told, process, canvas_length=CANVAS)["2 steps"]
    assert point.right == [True, False] and point.exact.mean == 0.5 and point.exact.low < point.exact.high


def test_the_base_is_decoded_at_each_temperature():
    denoiser = tiny_denoiser()
    judged = Judged(PROMPTS, word_tokenizer(), denoiser.target, **OPTIONS)
    greedy, drawn = base_points(judged, [0.0, 1.0]).values()
    assert greedy.answers == base_points(judged, [0.0])[BASE].answers != drawn.answers
