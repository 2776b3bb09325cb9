"""Penalties and a logit bias for each request: the same with and without a drafter."""

import itertools

import pytest
import torch

from dflash_ext.decode import Engine, decode
from dflash_ext.reference import penalised_logits
from python_tests.decode.oracle import own_outputs
from python_tests.decode.test_speculative import NEW, ROWS, expect_distribution, opinionated, small_pair
from python_tests.tiny import MASK_TOKEN, VOCAB, random_prompts, tiny_pair

PROMPTS = random_prompts(4, 9, 17, 30)


def counts_of(prompt: list[int], answer: list[int], vocab: int) -> torch.Tensor:
    counts = torch.zeros(vocab, dtype=torch.int32)
    counts[prompt] = -1
    for token in answer:
        counts[token] = max(int(counts[token]), 0) + 1
    return counts


def greedy(model, prompt: list[int], count: int, *, logit_bias=None, **penalties) -> list[int]:
    """What the target decodes greedily under penalties and a bias, written out anew."""
    bias = torch.zeros(model.config.vocab_size)
    for token, number in (logit_bias or {}).items():
        bias[token] = number
    tokens: list[int] = []
    for _ in range(count):
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1:]
        counts = counts_of(prompt, tokens, len(bias))[None]
        tokens.append(penalised_logits(logits, token_counts=counts, logit_bias=bias, **penalties)[0].argmax().item())
    return tokens


KINDS = [
    dict(repetition_penalty=1.3),
    dict(presence_penalty=0.4),
    dict(frequency_penalty=0.3),
    dict(repetition_penalty=0.8, presence_penalty=-0.2, frequency_penalty=0.5),
    dict(logit_bias={5: 0.7, 9: -float("inf")}),
    dict(repetition_penalty=1.5, logit_bias={token: 0.3 for token in range(3, 40)}),
]


@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: "+".join(changes))
def test_greedy_tokens_are_the_targets_under_the_same_penalties(changes):
    target, drafter = tiny_pair("qwen3")
    expected = [greedy(target.model, prompt, 20, **changes) for prompt in PROMPTS]
    assert expected != own_outputs(target.model, PROMPTS, 20)
    for draft, options in ((None, {}), (drafter, {}), (drafter, dict(denoising_steps=2, block_size=4))):
        decoded = decode(target, draft, PROMPTS, max_new_tokens=20, **changes, **options)
        assert [completion.tokens for completion in decoded.completions] == expected


def test_rows_with_and_without_penalties_share_cycles_and_slots():
    """Slots are taken again by rows of other kinds, whose tables must not be those of the row before."""
    target, drafter = tiny_pair("llama")
    engine = Engine(target, drafter, slots=3, max_length=100)
    kinds = list(itertools.islice(itertools.cycle([{}, *KINDS]), 25))
    prompts = random_prompts(*(3 + i % 7 for i in range(25)))
    requests = [
        engine.submit(prompt, max_new_tokens=4 + i % 9, **changes)
        for i, (prompt, changes) in enumerate(zip(prompts, kinds, strict=True))
    ]
    engine.run()
    for request, prompt, changes in zip(requests, prompts, kinds, strict=True):
        assert request.completion.tokens == greedy(target.model, prompt, request.max_new_tokens, **changes)


def test_a_drafted_token_counts_for_those_behind_it():
    """A drafter that always drafts one token: under a frequency penalty, few of them in a row are accepted."""
    target, drafter = tiny_pair("llama")
    favourite = 7
    drafter.logits = lambda target, hidden, head=None: torch.nn.functional.one_hot(
        torch.full(hidden.shape[:2], favourite), VOCAB
    ).float()
    changes = dict(logit_bias={favourite: 4.0}, frequency_penalty=1.5)
    expected = [greedy(target.model, prompt, 12, **changes) for prompt in PROMPTS]
    decoded = decode(target, drafter, PROMPTS, max_new_tokens=12, **changes)
    assert [completion.tokens for completion in decoded.completions] == expected
    cycles = [pair for c in decoded.completions for pair in zip(c.accepted, c.verified, strict=True)]
    assert any(0 < accepted < verified for accepted, verified in cycles)


def test_a_cycle_that_fails_counts_no_token_twice(monkeypatch):
    target, drafter = tiny_pair("llama")
    engine = Engine(target, drafter, slots=4, max_length=100)
    inject, faults = engine.cycle.draft.inject, itertools.cycle([True, False, False])

    def fail_at_times(tokens, features, positions, slots):
        if positions.shape[1] == 1 + engine.cycle.width and len(slots) > 1 and next(faults):
            raise torch.OutOfMemoryError("out of memory")
        inject(tokens, features, positions, slots)

    monkeypatch.setattr(engine.cycle.draft, "inject", fail_at_times)
    changes = dict(frequency_penalty=0.3)
    requests = [engine.submit(prompt, max_new_tokens=15, **changes) for prompt in PROMPTS]
    engine.run()
    assert [r.completion.tokens for r in requests] == [greedy(target.model, p, 15, **changes) for p in PROMPTS]


def exact_distribution(model, prompt: list[int], top_p: float | None, *, logit_bias=None, **penalties):
    bias = torch.zeros(model.config.vocab_size)
    for token, number in (logit_bias or {}).items():
        bias[token] = number
    exact = {}
    answers = list(itertools.product(range(len(bias)), repeat=NEW))
    logits = model(torch.tensor([[*prompt, *answer] for answer in answers])).logits[:, len(prompt) - 1 : -1].double()
    for tokens, rows in zip(answers, logits, strict=True):
        probability = 1.0
        for at, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            counts = counts_of(prompt, list(tokens[:at]), len(bias))[None]
            p = penalised_logits(row[None], token_counts=counts, logit_bias=bias, **penalties)[0].softmax(-1)
            order = p.argsort(descending=True).tolist()
            if top_p is not None:
                before = itertools.accumulate((p[i].item() for i in order), initial=0.0)
                order = [i for i, mass in zip(order, before, strict=False) if mass < top_p]
            kept = sum(p[i].item() for i in order)
            probability *= p[token].item() / kept if token in order and p[token] > 0 else 0.0
        exact[tokens] = probability
    return exact


@pytest.mark.parametrize(
    "changes, top_p, drafting",
    [
        (dict(repetition_penalty=1.6), None, {}),
        (dict(presence_penalty=0.5, frequency_penalty=0.8), 0.9, {}),
        (dict(frequency_penalty=-0.9, logit_bias={2: 1.0, 0: -float("inf")}), None, {}),
        (dict(frequency_penalty=1.0), None, dict(denoising_steps=3)),
        (dict(repetition_penalty=0.6), None, dict(greedy_draft=True)),
        (dict(frequency_penalty=1.0), None, None),
    ],
)
def test_sampling_under_penalties_keeps_the_targets_distribution(changes, top_p, drafting):
    target, drafter = small_pair(0.7)
    opinionated(drafter)
    prompt = [1, 3, 1]
    options = dict(max_new_tokens=NEW, batch_size=1000, seed=13, temperature=1.0, top_p=top_p)
    draft = None if drafting is None else drafter
    decoded = decode(target, draft, [prompt] * ROWS, **options, **changes, **(drafting or {}))
    expect_distribution(decoded.completions, exact_distribution(target.model, prompt, top_p, **changes))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(repetition_penalty=0), "repetition_penalty is 0.0; a number from 1e-30 to"),
        (dict(repetition_penalty=-1.0), "repetition_penalty is -1.0"),
        (dict(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        (dict(presence_penalty="much"), "presence_penalty is 'much'"),
        (dict(logit_bias=[5]), r"logit_bias is \[5\]|token_bias|logit_bias has 1 entries"),
        (dict(logit_bias=dict.fromkeys(range(VOCAB), -float("inf"))), f"logit_bias bans all {VOCAB} tokens of"),
        (dict(logit_bias={VOCAB: 1.0}), f"logit_bias has token {VOCAB}; the target's vocabulary has {VOCAB}"),
        (dict(logit_bias={5: float("inf")}), "logit_bias of token 5 is inf; a finite number or -inf is needed"),
        (dict(logit_bias={5: "more"}), "logit_bias is 'more'"),
        (dict(logit_bias={"a": 1.0}), "logit_bias has the key 'a'; token ids are needed"),
    ],
)
def test_refuses_penalties(options, message):
    target, drafter = tiny_pair("llama")
    engine = Engine(target, drafter, slots=1, max_length=30)
    with pytest.raises((ValueError, TypeError), match=message):
        engine.submit([5, 6], max_new_tokens=4, **options)
    with pytest.raises((ValueError, TypeError), match=message):
        decode(target, drafter, [[5, 6], [7, MASK_TOKEN - 1]], max_new_tokens=4, **options)
