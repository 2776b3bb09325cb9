"""The check of transformers' static cache finds nothing where the cache is right."""

from dflash_ext import doctor
from dflash_ext.integrations.diffusion_gemma import WINDOW, static_cache_difference


def test_only_prompts_as_long_as_the_window_differ(monkeypatch):
    assert static_cache_difference(WINDOW - 2) < 1e-4
    for difference, told in (
        (static_cache_difference(), "its static cache is wrong"),
        (1e-5, "gives the logits of its"),
    ):
        monkeypatch.setattr(doctor, "static_cache_difference", lambda difference=difference: difference)
        assert told in doctor._static_cache()
