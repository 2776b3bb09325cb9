import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from dflash_ext.decode.canvas import MaskedDiffusion
from dflash_ext.eval.ablation import (
    BASE,
    VARIANTS,
    AblationPrompt,
    Sample,
    ablate,
    figures,
    plot_ablation,
    shown_samples,
    table,
)
from dflash_ext.models.denoiser_files import denoiser_of
from python_tests.data.words import word_tokenizer
from python_tests.models.test_adaptation import adaptation_of
from python_tests.tiny import VOCAB

PROMPTS = (AblationPrompt("narrative", "w005 w006"), AblationPrompt("infill", "w007", " w008 w009"))


@pytest.fixture(scope="module")
def found():
    adaptation = adaptation_of("llama", mask_id=VOCAB)
    variants = {"left to right": VARIANTS["E_linear_reveal"], "argmax": VARIANTS["I_argmax"]}
    options = dict(canvas_length=8, max_new_tokens=8, samples=2)
    return ablate(denoiser_of(adaptation), adaptation.target, word_tokenizer(), PROMPTS, variants, **options)


def test_answers_and_their_figures(found):
    assert list(found) == ["left to right", "argmax", BASE]
    for name, samples in found.items():
        assert [each.prompt.kind for each in samples] == ["narrative", "narrative", "infill", "infill"]
        for each in samples:
            most = 6 if each.prompt.kind == "infill" and name != BASE else 8  # of a gap, what was filled in
            assert len(each.tokens) <= most and VOCAB not in each.tokens
    first, second = found["argmax"][:2]
    assert first.tokens == second.tokens  # seeds change nothing without draws
    told = json.loads(json.dumps(figures(found)))
    assert set(told["argmax"]) == {"filler", "repetition", "nll", "distinct_1", "distinct_2", "distinct_3", "kinds"}
    assert set(told["argmax"]["kinds"]) == {"narrative", "infill"}


def test_an_answer_without_a_token_has_no_likelihood():
    one = Sample(PROMPTS[0], "w005", [5], 0.5, 0.0, 2.0)
    none = replace(one, text="", tokens=[], nll=math.nan)
    told = figures({"some": [one, none], "none": [none, none]})
    json.dumps(told, allow_nan=False)
    assert told["some"]["nll"]["mean"] == told["some"]["kinds"]["narrative"]["nll"] == 2.0
    assert told["none"]["nll"]["mean"] is None and told["none"]["kinds"]["narrative"]["nll"] is None


def test_what_is_shown(found, tmp_path):
    assert table(found).row_count == 3
    out = io.StringIO()
    Console(file=out, width=80).print(table(found))
    assert "…" not in out.getvalue() and "nan" not in out.getvalue()
    text = shown_samples(found)
    assert text.count("**argmax**") == 2 and "## infill" in text
    plot_ablation(found, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_the_variants_of_the_build_log():
    assert [name for name in VARIANTS if name[1] == "_"] == [
        *("A_baseline", "B_temp_low", "C_topp_90", "D_temp07_topp90", "E_linear_reveal", "F_cosine_reveal"),
        *("G_8_steps", "H_32_steps", "I_argmax"),
    ]
    assert VARIANTS["F_cosine_reveal"] == MaskedDiffusion(schedule="cosine", order="left_to_right")
    assert VARIANTS["maskgit_cosine"] == MaskedDiffusion(schedule="cosine", order="confidence")


def test_a_suffix_that_leaves_no_gap():
    adaptation = adaptation_of("llama", mask_id=VOCAB)
    with pytest.raises(ValueError, match="a suffix of 2 tokens leaves no gap in a canvas of 2 tokens"):
        ablate(denoiser_of(adaptation), adaptation.target, word_tokenizer(), PROMPTS, canvas_length=2, samples=1)


def test_a_denoiser_of_uniform_noise_is_refused():
    adaptation = adaptation_of("llama")
    denoiser = replace(denoiser_of(adaptation), mask_id=None)
    with pytest.raises(ValueError, match="a denoiser of uniform noise has no mask token"):
        ablate(denoiser, adaptation.target, word_tokenizer(), PROMPTS, samples=1)
