"""What fails ends its own request, and leaves the others, the slots and the memory as they were."""

import gc
import random

import pytest
import torch

from dflash_ext.decode import Engine, Request, decode
from dflash_ext.decode.prefill import prefill
from python_tests.decode.oracle import own_output, own_outputs
from python_tests.decode.test_families import pair, tiny
from python_tests.tiny import VOCAB, random_prompts, tiny_pair

NEW = 15


class Words:
    """A tokenizer whose tokens are words of one to three letters, without spaces between them."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join("abcdefghij"[token % 10] * (1 + token % 3) for token in ids)


def engine_of(family: str = "llama", **options) -> Engine:
    target, drafter = tiny_pair(family)
    return Engine(target, drafter, **{"slots": 4, "max_length": 200} | options)


def submit_all(engine: Engine, prompts, **options) -> list[Request]:
    return [engine.submit(prompt, max_new_tokens=NEW, **options) for prompt in prompts]


def expect_own_output(engine: Engine, requests: list[Request]) -> None:
    expected = own_outputs(engine.target.model, [list(request.prompt) for request in requests], NEW)
    assert [request.completion.tokens for request in requests] == expected
    assert not engine.rows and not engine.waiting and sorted(engine.free) == [0, 1, 2, 3]


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("out of memory")


def test_a_callback_that_raises_ends_its_request_alone():
    engine, finished = engine_of(), []
    prompts = random_prompts(4, 9, 17)

    def fail(_tokens):
        raise KeyError("a fault of the user's")

    options = dict(on_tokens=fail, on_finish=finished.append)
    faulty = engine.submit(prompts[0], max_new_tokens=NEW, **options)
    others = submit_all(engine, prompts[1:])
    with pytest.raises(KeyError, match="a fault of the user's"):
        engine.run()
    assert faulty.completion.finish_reason == "error" and finished == [faulty.completion]
    assert "in fail" in faulty.completion.error.__notes__[0]
    with pytest.raises(KeyError, match="a fault of the user's"):
        list(engine.stream(faulty))
    expect_own_output(engine, others)
    engine.run()  # the fault is raised once


def test_an_interrupt_in_a_callback_is_raised_after_the_others_have_their_tokens():
    engine = engine_of()
    prompts = random_prompts(4, 9, 17)

    def interrupt(_tokens):
        raise KeyboardInterrupt

    stopped = engine.submit(prompts[0], max_new_tokens=NEW, on_tokens=interrupt)
    others = submit_all(engine, prompts[1:])
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert stopped.completion.finish_reason == "error" and all(len(r.completion.tokens) == 1 for r in others)
    engine.run()
    expect_own_output(engine, others)


def test_callbacks_may_cancel_and_submit():
    engine = engine_of()
    prompts, later, finished = random_prompts(4, 9, 17), [], []

    def cancel_all(_tokens):
        for request in requests[:2]:
            engine.cancel(request)
        later.append(engine.submit(prompts[2], max_new_tokens=NEW))

    requests = [engine.submit(prompts[0], max_new_tokens=NEW, on_tokens=cancel_all, on_finish=finished.append)]
    requests += submit_all(engine, prompts[1:])
    engine.run()
    assert [request.completion.finish_reason for request in requests] == ["cancelled", "cancelled", "length"]
    assert len(later) == 1 and not finished
    expect_own_output(engine, [requests[2], *later])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cycle_that_needs_too_much_memory_is_run_for_fewer_rows(rows, monkeypatch):
    """What fitted is kept to until the engine has been empty."""
    engine = engine_of()
    denoise = engine.cycle.draft.denoise
    seen = []

    def short_of_memory(given, *others):
        seen.append(len(given.slots))
        return denoise(given, *others) if len(given.slots) <= rows else out_of_memory()

    monkeypatch.setattr(engine.cycle.draft, "denoise", short_of_memory)
    for _ in range(2):
        requests = submit_all(engine, random_prompts(4, 9, 17, 3, 11, 6))
        engine.run()
        expect_own_output(engine, requests)
        assert seen[:2] == [4, 2] and seen.count(4) == 1 and seen.count(2) > 20 * (rows == 2) and rows in seen
        seen.clear()


def test_a_cycle_that_fails_after_its_commit_is_repeated_from_its_beginning(monkeypatch):
    engine = engine_of()
    inject = engine.cycle.draft.inject
    faults = iter([True, False, True, False, False] * 100)

    def fail_at_times(tokens, features, positions, slots):
        is_cycle = positions.shape[1] == 1 + engine.cycle.width
        if is_cycle and len(slots) > 1 and next(faults):
            out_of_memory()
        inject(tokens, features, positions, slots)

    monkeypatch.setattr(engine.cycle.draft, "inject", fail_at_times)
    requests = submit_all(engine, random_prompts(4, 9, 17, 3))
    engine.run()
    expect_own_output(engine, requests)


def test_a_prompt_that_needs_too_much_memory_ends_alone(monkeypatch):
    engine = engine_of()

    def short_of_memory(cycle, requests, drawing):
        if any(len(request.prompt) > 50 for request in requests):
            out_of_memory()
        return prefill(cycle, requests, drawing)

    monkeypatch.setattr("dflash_ext.decode.engine.prefill", short_of_memory)
    prompts = random_prompts(4, 60, 17, 3, 70, 5)
    requests = submit_all(engine, prompts)
    engine.step()
    assert engine.most == {True: 2}  # the others are read in pairs, and not one by one
    with pytest.raises(torch.OutOfMemoryError):
        engine.run()
    failed = [requests[1], requests[4]]
    assert all(request.completion.finish_reason == "error" and not request.completion.tokens for request in failed)
    expect_own_output(engine, [request for request in requests if request not in failed])


@pytest.mark.parametrize("family", ["llama", "gpt2", "xglm"])
@pytest.mark.parametrize("where", ["prompt", "cycle"])
def test_logits_that_are_not_finite_end_their_row_alone(where, family):
    """One token's embedding is not finite: a row fails as soon as the target reads it. Its slot serves others again."""
    bad = 90
    if family == "llama":
        target, drafter = tiny_pair("llama")
    else:
        target, drafter = pair(tiny(family), [1, 2])
    engine = Engine(target, drafter, slots=2, max_length=100)
    prompts = [[token for token in prompt if token != bad] for prompt in random_prompts(4, 9, 17, 11)]
    expected = own_outputs(target.model, prompts, NEW)
    assert not any(bad in tokens for tokens in expected)
    others = submit_all(engine, prompts[:1])
    prompt, bias = ([*[bad] * 40, 7], {}) if where == "prompt" else ([5] * 30, {bad: 1000.0})
    faulty = engine.submit(prompt, max_new_tokens=NEW, logit_bias=bias)
    others += submit_all(engine, prompts[1:])
    weight = target.model.get_input_embeddings().weight
    if target.head.data_ptr() == weight.data_ptr():
        target.model.get_output_embeddings().weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    weight[bad] = float("nan")
    with pytest.raises(FloatingPointError, match="logits are not finite after . decoded tokens"):
        engine.run()
    assert faulty.completion.finish_reason == "error"
    assert faulty.completion.tokens == ([] if where == "prompt" else [bad])
    assert [request.completion.tokens for request in others] == expected


def test_decode_raises_a_fault_when_the_other_prompts_have_ended():
    target, drafter = tiny_pair("llama")
    prompts, finished = random_prompts(4, 9, 17), {}

    def fail(index, _tokens):
        if index == 1:
            raise KeyError("a fault of the user's")

    with pytest.raises(KeyError):
        decode(target, drafter, prompts, max_new_tokens=NEW, on_tokens=fail, on_finish=finished.__setitem__)
    expected = {index: own_output(target.model, prompts[index], NEW) for index in (0, 2)}
    assert {index: completion.tokens for index, completion in finished.items()} == expected


def random_request(chance: random.Random, *, greedy: bool) -> dict:
    options = dict(
        prompt=random_prompts(chance.randint(1, 40), seed=chance.randrange(10**6))[0],
        max_new_tokens=chance.randint(1, 16),
        seed=chance.randrange(10**6),
    )
    if not greedy and chance.random() < 0.7:
        options["temperature"] = chance.choice([0.5, 1.0, 1.7])
        options |= {"top_k": 5} if chance.random() < 0.3 else {}
        options |= {"top_p": 0.8} if chance.random() < 0.3 else {}
        options |= {"min_p": 0.1} if chance.random() < 0.3 else {}
    if chance.random() < 0.3:
        options |= {"frequency_penalty": chance.uniform(-1, 1), "repetition_penalty": chance.uniform(0.7, 1.5)}
    if chance.random() < 0.2:
        options["logit_bias"] = {chance.randrange(VOCAB): chance.uniform(-2, 2) for _ in range(9)}
    if chance.random() < 0.4:
        options["stop_token_ids"] = chance.sample(range(3, 90), chance.randint(1, 20))
    if chance.random() < 0.4:
        options["stop_strings"] = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 4))) for _ in range(5)]
    return options


def tensors_in_memory() -> tuple[int, int]:
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return len(tensors), sum(tensor.numel() for tensor in tensors)


def test_200_mixed_requests_end_right_and_leave_no_memory_behind(monkeypatch):
    """Lengths, ways of drawing, block sizes, stops, callbacks that raise, cancellations and failing forwards."""
    target, drafter = tiny_pair("qwen3")
    chance = random.Random(0)
    kinds = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    for block_size in (None, 2, 4, "auto"):
        sizes = dict(max_length=60, tokenizer=Words(), block_size=block_size)
        alone = Engine(target, drafter, slots=1, **sizes)
        # The widths that "auto" chooses depend on the other rows, and so do the draws at a temperature above 0.
        given = [random_request(chance, greedy=block_size == "auto") for _ in range(50)]
        expected = [alone.submit(**options) for options in given]
        alone.run()

        engine = Engine(target, drafter, slots=5, **sizes)
        denoise, requests, failing, streamed = engine.cycle.draft.denoise, [], set(), {}

        def at_times_out_of_memory(rows, *others, denoise=denoise):
            return out_of_memory() if len(rows.slots) > 1 and chance.random() < 0.1 else denoise(rows, *others)

        def callback(index: int, failing=failing, streamed=streamed):
            streamed[index] = []
            if chance.random() < 0.1:
                failing.add(index)
                when = chance.randint(1, 6)

            def on_tokens(tokens):
                streamed[index] += tokens
                if index in failing and len(streamed[index]) >= when:
                    raise ValueError(f"the callback of request {index}")

            return on_tokens

        monkeypatch.setattr(engine.cycle.draft, "denoise", at_times_out_of_memory)
        for first in (dict(stop_token_ids=range(20)), dict(frequency_penalty=1.0, logit_bias={5: 1.0})):
            engine.submit([5, 6], max_new_tokens=8, **first)
        engine.run()  # what is made when it is first needed
        before = tensors_in_memory()
        while len(requests) < len(given) or engine.step():
            while len(requests) < len(given) and chance.random() < 0.7:
                index = len(requests)
                requests.append(engine.submit(**given[index], on_tokens=callback(index)))
            running = [request for request in requests if not request.done]
            if running and chance.random() < 0.1:
                engine.cancel(chance.choice(running))
        assert tensors_in_memory() == before
        assert not engine.rows and not engine.waiting and sorted(engine.free) == [0, 1, 2, 3, 4]
        for index, (request, single) in enumerate(zip(requests, expected, strict=True)):
            got, want = request.completion, single.completion
            kinds[got.finish_reason] += 1
            if got.finish_reason == "error":
                assert (
                    index in failing
                    and got.error.__traceback__ is None
                    and str(got.error) == f"the callback of request {index}"
                )
            if got.finish_reason in ("error", "cancelled"):
                assert single.text.tokens[: len(got.tokens)] == got.tokens
            else:
                assert (got.tokens, got.text, got.finish_reason) == (want.tokens, want.text, want.finish_reason)
                assert streamed[index] == got.tokens
    assert sum(kinds.values()) == 200 and min(kinds.values()) > 5, kinds
