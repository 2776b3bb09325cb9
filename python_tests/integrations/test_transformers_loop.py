"""The drafter inside transformers' own DFlash loop, as it is."""

import pytest
import torch
from transformers.generation import candidate_generator

from dflash_ext.decode import decode
from python_tests.tiny import FAMILIES, random_prompts, tiny_pair

pytestmark = pytest.mark.skipif(
    not hasattr(candidate_generator, "DFlashTokenCandidateGenerator"), reason="transformers has this loop from 5.15 on"
)


@pytest.mark.parametrize(("sliding", "is_causal"), [(False, None), (True, None), (True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_drafts_and_same_greedy_tokens(family, sliding, is_causal):
    target, drafter = tiny_pair(family, sliding=sliding)
    drafter.config.is_causal = is_causal
    drafts = []
    drafter.register_forward_hook(lambda _m, _a, out: drafts.append(target.head @ out.last_hidden_state[0, 1:].T))
    (prompt,) = random_prompts(11)
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids))
    plain = target.model.generate(ids, **options)
    theirs = target.model.generate(ids, assistant_model=drafter, speculation_type="dflash", **options)
    their_drafts, drafts[:] = list(drafts), []
    ours = decode(target, drafter, [prompt], max_new_tokens=24)
    assert theirs[0].tolist() == plain[0].tolist()
    assert prompt + ours.completions[0].tokens == plain[0].tolist()
    assert len(their_drafts) > 10
    for one, other in zip(their_drafts, drafts, strict=False):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
