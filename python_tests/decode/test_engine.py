"""The engine: requests that come, go, wait and are cancelled get what they would get alone."""

import random

import pytest
import torch

from dflash_ext.decode import Engine
from dflash_ext.models import DFlashDrafter, Target
from python_tests.decode.oracle import own_output, own_outputs
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model, tiny_pair


def engine_of(family: str, *, drafted: bool = True, **options) -> tuple[Engine, Target]:
    target, drafter = tiny_pair(family)
    return Engine(target, drafter if drafted else None, **{"slots": 3, "max_length": 200} | options), target


@pytest.mark.parametrize("drafted", [True, False])
def test_requests_join_leave_and_are_cancelled_at_random(drafted):
    engine, target = engine_of("qwen3", drafted=drafted, slots=4)
    chance = random.Random(0)
    prompts = random_prompts(*(chance.randint(1, 60) for _ in range(60)))
    expected = own_outputs(target.model, prompts, 20)
    requests, cancelled, finished = [], [], []
    while len(requests) < len(prompts) or engine.step():
        while len(requests) < len(prompts) and chance.random() < 0.6:
            index = len(requests)
            request = engine.submit(
                prompts[index],
                max_new_tokens=chance.randint(1, 20),
                stop_token_ids=expected[index][chance.randint(0, 19)] if chance.random() < 0.3 else None,
                on_finish=finished.append,
            )
            requests.append(request)
        running = [request for request in requests if not request.done]
        if running and chance.random() < 0.1:
            cancelled.append(chance.choice(running))
            engine.cancel(cancelled[-1])
    for request, tokens in zip(requests, expected, strict=True):
        got = request.completion.tokens
        wanted = tokens[: request.max_new_tokens]
        stops = [i for i, token in enumerate(wanted) if token in request.stops]
        wanted = wanted[: stops[0] + 1] if stops else wanted
        if request in cancelled:
            assert request.completion.finish_reason == "cancelled" and got == wanted[: len(got)]
        else:
            assert request.completion.finish_reason == ("stop" if stops else "length") and got == wanted
    assert 0 < len(cancelled) < 30 and len(finished) == 60 - len(cancelled)
    assert not engine.rows and not engine.waiting and sorted(engine.free) == [0, 1, 2, 3]


def test_streams_of_several_requests():
    engine, target = engine_of("llama")
    prompts = random_prompts(4, 9, 17)
    requests = [engine.submit(prompt, max_new_tokens=15) for prompt in prompts]
    pieces = list(engine.stream(requests[1]))
    assert len(pieces) > 1
    assert sum(pieces, []) == requests[1].completion.tokens == own_output(target.model, prompts[1], 15)
    for request, prompt in zip(requests, prompts, strict=True):
        assert sum(engine.stream(request), []) == own_output(target.model, prompt, 15)


def test_a_request_of_another_engine_is_refused():
    (engine, _), (other, _) = engine_of("llama"), engine_of("llama")
    request = other.submit([3, 4], max_new_tokens=3)
    for use in (engine.cancel, lambda request: next(engine.stream(request))):
        with pytest.raises(ValueError, match="^the request was submitted to another engine$"):
            use(request)
    other.run()
    assert request.completion.finish_reason == "length"


def stream_one(engine: Engine) -> None:
    list(engine.stream(next(iter(engine.rows.values()))))


@pytest.mark.parametrize("use", [Engine.run, Engine.step, stream_one])
def test_a_callback_does_not_step_its_engine(use):
    """Its own request ends with the fault, and the other one goes on."""
    engine, target = engine_of("llama")
    prompts = random_prompts(4, 9)
    bad = engine.submit(prompts[0], max_new_tokens=12, on_tokens=lambda tokens: use(engine))
    good = engine.submit(prompts[1], max_new_tokens=12)
    with pytest.raises(RuntimeError, match="^an engine's callbacks may submit and cancel requests, but not"):
        engine.run()
    assert bad.completion.finish_reason == "error"
    assert good.completion.tokens == own_output(target.model, prompts[1], 12)


def test_refuses_what_is_no_request_and_rows_without_room():
    engine, target = engine_of("llama")
    with pytest.raises(TypeError, match="^Engine: a request is None"):
        engine.cancel(None)
    with pytest.raises(ValueError, match="^max_length is 0"):
        Engine(target, None, max_length=0)


def test_rows_of_other_temperatures_and_seeds_do_not_change_a_row():
    engine, target = engine_of("llama")
    prompts = random_prompts(4, 9, 17, 5)
    options = dict(max_new_tokens=20)
    alone = engine.submit(prompts[0], temperature=1.0, top_p=0.9, seed=3, **options)
    engine.run()
    mixed = [engine.submit(prompts[0], temperature=1.0, top_p=0.9, seed=3, **options)]
    mixed += [engine.submit(p, temperature=t, seed=4, **options) for p, t in zip(prompts[1:], (0, 0.7, 0), strict=True)]
    engine.run()
    assert mixed[0].completion.tokens == alone.completion.tokens
    for request, prompt in zip(mixed[1::2], prompts[1::2], strict=True):
        assert request.completion.tokens == own_output(target.model, prompt, 20)


@pytest.mark.parametrize("window", [8, 200])
def test_long_prompts_are_read_in_chunks_and_a_window_leaves_its_pages_behind(window):
    """Layers with a window have 512 places for rows of 900 tokens, which are read and decoded across them."""
    model = tiny_model("gemma3", max_position_embeddings=1000, sliding_window=window)
    drafter = DFlashDrafter.for_target(Target(model), mask_token_id=MASK_TOKEN, num_layers=1, taps=1, block_size=4)
    target = Target(model, drafter.config.target_layer_ids)
    engine = Engine(target, drafter.eval(), slots=2, max_length=900)
    assert {tuple(keys.shape) for keys, _ in engine.cycle.target.cache.layers} == {(3, 2, 1024, 16), (6, 2, 256, 16)}
    prompts = random_prompts(760, 3, 505, 300)
    lengths = [12, 6, 12, 6]
    requests = [engine.submit(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
    engine.run()
    for request, prompt, length in zip(requests, prompts, lengths, strict=True):
        assert request.completion.tokens == own_output(target.model, prompt, length)


def test_a_finished_slot_writes_nothing_until_it_is_taken_again():
    engine, _ = engine_of("llama", slots=2)
    short, long = random_prompts(4, 9)
    first = engine.submit(short, max_new_tokens=2)
    engine.submit(long, max_new_tokens=30)
    while not first.done:
        engine.step()
    before = engine.cycle.target.cache.keys[:, 0].clone()
    engine.run()
    assert torch.equal(engine.cycle.target.cache.keys[:, 0], before)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=[]), "prompt 0 has no tokens"),
        (dict(prompt=[97]), "prompt 0 has token 97"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=198), "3 tokens and 198 new ones do not fit: the engine was made for 200 tokens"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(seed=0.5), "seed is 0.5"),
    ],
)
def test_refuses_a_request(options, message):
    engine, _ = engine_of("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        engine.submit(**{"prompt": [5, 6, 7], "max_new_tokens": 4} | options)
    assert not engine.waiting


def test_exact_mode_gives_the_same_bits_with_and_without_a_drafter():
    target, drafter = tiny_pair("qwen3")
    prompts, caches = random_prompts(4, 9, 300), []
    for draft in (drafter, None):
        engine = Engine(target, draft, slots=3, max_length=400, exact=True)
        requests = [engine.submit(prompt, max_new_tokens=20) for prompt in prompts]
        engine.run()
        assert [r.completion.tokens for r in requests] == own_outputs(target.model, prompts, 20)
        cache = engine.cycle.target.cache
        caches.append([x[:, i, :, : len(p) + 19] for x in (cache.keys, cache.values) for i, p in enumerate(prompts)])
    assert all(torch.equal(one, other) for one, other in zip(*caches, strict=True))


def test_refuses_numbers_and_targets():
    target, drafter = tiny_pair("llama")
    with pytest.raises(ValueError, match="slots is 0"):
        Engine(target, drafter, slots=0)
    with pytest.raises(ValueError, match="rows of 513 tokens do not fit: the target has 512 positions"):
        Engine(target, drafter, max_length=513)
    target.layers[0].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="exact=True is not supported: .* no forward of its own for this LlamaFor"):
        Engine(target, drafter, max_length=100, exact=True)


def test_many_slots_are_filled_again_several_at_a_time(monkeypatch):
    """Where requests wait. One that finds a slot free among few, or that is the last, does not wait for others."""
    engine, target = engine_of("llama", drafted=False, slots=64)
    prompts = random_prompts(*(1 + i % 5 for i in range(100)))
    admitted = []
    admit = engine._admit
    monkeypatch.setattr(engine, "_admit", lambda requests: (admitted.append(len(requests)), admit(requests)))
    requests = [engine.submit(prompt, max_new_tokens=2 + i % 7) for i, prompt in enumerate(prompts)]
    engine.run()
    assert sum(admitted) == 100 and admitted[0] == 64 and min(admitted[:-1]) >= 2
    for i in range(0, 100, 9):
        assert requests[i].completion.tokens == own_output(target.model, prompts[i], 2 + i % 7)
    few, _ = engine_of("llama", drafted=False, slots=2)
    requests = [few.submit(prompt, max_new_tokens=2 + 5 * i) for i, prompt in enumerate(prompts[:3])]
    while not requests[0].done:
        few.step()
    few.step()
    assert requests[2].slot is not None and not requests[1].done
