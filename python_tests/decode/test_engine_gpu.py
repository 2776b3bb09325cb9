"""The decode engine on a GPU: graphs replayed over changing lengths and rows, in bfloat16."""

import gc
import math

import pytest
import torch

from dflash_ext.decode import Engine, decode, graphs
from dflash_ext.decode.costs import CATCHING_UP
from dflash_ext.decode.graphs import GraphRunner, PlainRunner
from dflash_ext.decode.pace import Pace
from dflash_ext.models import DFlashDrafter, Target
from python_tests.decode.calls import with_calls
from python_tests.decode.test_families import tiny
from python_tests.decode.test_forward import MODELS
from python_tests.tiny import MASK_TOKEN, random_prompts, tiny_model

pytestmark = pytest.mark.gpu

SHAPES = {
    "llama": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": dict(hidden_size=128, head_dim=64),
    "gemma3": dict(hidden_size=128, head_dim=64),
}
FAMILIES = list(SHAPES)


def pair(family: str) -> tuple[Target, DFlashDrafter]:
    model = tiny_model(family, **SHAPES[family]).to("cuda", torch.bfloat16)
    options = dict(mask_token_id=MASK_TOKEN, num_layers=2, block_size=6, taps=3)
    drafter = DFlashDrafter.for_target(Target(model), **options).to("cuda", torch.bfloat16).eval()
    return Target(model, drafter.config.target_layer_ids), drafter


def regret(model, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """How much less likely than the best token a greedy token was at most, in nats, under the model in float32."""
    exact = type(model)(model.config).float().eval()
    exact.load_state_dict({name: x.float().cpu() for name, x in model.state_dict().items()})
    worst = 0.0
    for prompt, tokens in zip(prompts, answers, strict=True):
        logp = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, (logp.amax(-1) - chosen).max().item())
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_get_the_targets_tokens(family):
    target, drafter = pair(family)
    prompts = random_prompts(3, 300, 17, 40, 5, 1, 60, 9, 33, 12, 7, 90, 2)
    for draft in (drafter, None):
        decoded = decode(target, draft, prompts, max_new_tokens=24, batch_size=5, stop_token_ids=[7, 8])
        for completion in decoded.completions:
            assert completion.tokens[-1] in (7, 8) or len(completion.tokens) == 24
            assert not {7, 8} & set(completion.tokens[:-1])
        assert regret(target.model, prompts, [completion.tokens for completion in decoded.completions]) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_served_in_bfloat16(name):
    """Windows of 8 keys are shorter than the prompts and than the answers. Graphs are replayed across them.

    Layers with a window have 512 places, which the longest row passes while it is decoded.
    """
    model = MODELS[name]().to("cuda", torch.bfloat16).eval().requires_grad_(False)
    model.config.max_position_embeddings = 1024
    options = dict(mask_token_id=MASK_TOKEN, num_layers=2, block_size=6, taps=3)
    drafter = DFlashDrafter.for_target(Target(model), **options).to("cuda", torch.bfloat16).eval()
    target, prompts = Target(model, drafter.config.target_layer_ids), random_prompts(3, 500, 40)
    for draft in (drafter, None):
        engine = Engine(target, draft, slots=2, max_length=600)
        assert isinstance(engine.runner, GraphRunner)
        requests = [engine.submit(prompt, max_new_tokens=24) for prompt in prompts]
        engine.run()
        assert regret(model, prompts, [request.completion.tokens for request in requests]) < 0.05
    exact = [
        [completion.tokens for completion in decode(target, draft, prompts, max_new_tokens=24, exact=True).completions]
        for draft in (drafter, None)
    ]
    assert exact[0] == exact[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_graph_does_what_the_cycle_does(temperature):
    """The same shapes, so that the bits are the same: four rows, which end together."""
    target, drafter = pair("qwen3")
    texts = []
    for captured in (True, False):
        engine = Engine(target, drafter, slots=4, max_length=200)
        assert isinstance(engine.runner, GraphRunner)
        if not captured:
            with_calls(engine)
        options = dict(max_new_tokens=40, temperature=temperature, top_p=0.9 if temperature else None)
        requests = [engine.submit(p, seed=i, **options) for i, p in enumerate(random_prompts(4, 9, 70, 31))]
        engine.run()
        texts.append([request.completion.tokens for request in requests])
        accepted = [request.completion.accepted for request in requests]
    assert texts[0] == texts[1]
    assert all(accepted)


class Scripted(DFlashDrafter):
    """Drafts a known text, wrong at every fourth position. What it needs lies on the device, for a captured graph."""

    def script(self, text: list[int]) -> None:
        self.text = torch.tensor([*text, *[0] * 64], device="cuda")

    def decode_masks(self, cache_lens, block_len, kv_len):
        self.starts = cache_lens
        return super().decode_masks(cache_lens, block_len, kv_len)

    def logits(self, target, hidden, head=None):
        at = self.starts[:, None] + torch.arange(1, hidden.shape[1] + 1, device="cuda")
        tokens = torch.where(at % 4 == 0, 5, self.text[at.clamp(max=len(self.text) - 1)])
        return torch.nn.functional.one_hot(tokens, target.vocab_size).to(target.dtype)


def test_the_times_of_a_graph_outlast_the_replays_of_others():
    """Graphs share their memory. One that was captured earlier runs again before the times are read."""
    target, drafter = pair("qwen3")
    engine = Engine(target, drafter, slots=8, max_length=200)
    for count in (1, 8, 1):
        for prompt in random_prompts(*[5] * count):
            engine.submit(prompt, max_new_tokens=20)
        engine.run()
    assert len(engine.runner.graphs) >= 2
    assert all(0 < seconds < 10 for seconds in engine.runner.seconds().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_mode_gives_the_same_bits_whatever_is_drafted(family):
    """Requests of one prompt and several lengths, so that rows of other lengths stand beside each."""
    target, drafter = pair(family)
    (prompt,) = random_prompts(300)
    scripted = Scripted(drafter.config).to("cuda", torch.bfloat16).eval()
    options, texts, caches = dict(slots=3, max_length=500, exact=True), [], []
    for draft in (None, drafter, scripted):
        engine = Engine(target, draft, **options)
        requests = [engine.submit(prompt, max_new_tokens=n) for n in (90, 30, 60, 90, 20, 10)]
        engine.run()
        texts.append([request.completion.tokens for request in requests])
        slot = requests[3].slot
        caches.append(engine.cycle.target.cache.keys[:, slot, :, : 300 + 30].clone())
        scripted.script(prompt + texts[0][0])
    assert texts[0] == texts[1] == texts[2]
    assert sum(requests[0].completion.accepted) > 40
    assert all(torch.equal(caches[0], other) for other in caches[1:])


@pytest.mark.parametrize("useful", [True, False])
def test_auto_gives_the_same_bits_while_graphs_are_made(useful, monkeypatch):
    """The host is up to 20 cycles behind, rows end meanwhile, and others take their places.

    Plain cycles have their graph when drafts begin, so that they stand in for them.
    """
    monkeypatch.setattr(Pace, "choose", lambda self, cycles, *given: max(cycles) if self.passed % 60 > 20 else 0)
    target, drafter = pair("qwen3")
    lengths, options = (150, 90, 200, 260, 33, 70, 1, 120), dict(slots=3, max_length=300, exact=True)
    plain = Engine(target, None, **options)
    requests = [plain.submit(prompt, max_new_tokens=260) for prompt in random_prompts(*[30] * 20)]
    plain.run()
    texts = [(request.prompt, request.completion.tokens) for request in requests]
    # Most texts of so small a model repeat a few tokens. The rows shall not end before one that comes late.
    prompt, expected, end = next(
        (prompt, text, at) for prompt, text in texts for at in range(60, 150) if text[at] not in text[:at]
    )
    if useful:
        drafter = Scripted(drafter.config).to("cuda", torch.bfloat16).eval()
        drafter.script(prompt + expected)
    engine = Engine(target, drafter, block_size="auto", **options)
    lags, accepted, plan = [], 0, engine.runner.plan
    engine.runner.plan = lambda *given: (plan(*given), lags.append(engine.runner.lag))[0]
    for _ in range(3):
        requests = [engine.submit(prompt, max_new_tokens=n, stop_token_ids=expected[end]) for n in lengths]
        engine.run()
        assert [r.completion.tokens for r in requests] == [expected[: min(n, end + 1)] for n in lengths]
        accepted += sum(map(sum, (r.completion.accepted for r in requests)))
    assert max(lags) > 5 and any(width for *_, width in engine.runner.graphs)
    assert CATCHING_UP in engine.costs.tables()
    assert all(seconds > 0 for table in engine.costs.tables().values() for seconds in table.values())
    assert accepted > 50 or not useful


def test_nothing_waits_for_the_device_in_a_cycle():
    assert_nothing_waits(Engine(*pair("llama"), slots=2, max_length=200))


def assert_nothing_waits(engine: Engine) -> None:
    """Replays a cycle under a mode in which waiting for the device raises."""
    assert isinstance(engine.runner, GraphRunner)
    for prompt in random_prompts(4, 9):
        engine.submit(prompt, max_new_tokens=30)
    for _ in range(3):
        engine.step()
    slots, (_, drawing, width) = list(engine.rows), next(iter(engine.runner.graphs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.runner.run(slots, drawing, width)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.run()


def graphs_and_calls(
    target, drafter, prompts, *, slots: int = 4, engine_options=(), **options
) -> list[list[list[int]]]:
    """The tokens that an engine gives with graphs, and those that it gives with plain calls."""
    texts = []
    for captured in (True, False):
        engine = Engine(target, drafter, slots=slots, max_length=200, **dict(engine_options))
        engine = engine if captured else with_calls(engine)
        requests = [engine.submit(p, seed=i, **options) for i, p in enumerate(prompts)]
        engine.run()
        texts.append([request.completion.tokens for request in requests])
    return texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafting", [dict(denoising_steps=3), dict(greedy_draft=True), dict(block_size=3)])
def test_graphs_of_every_way_of_drafting(drafting, temperature):
    target, drafter = pair("qwen3")
    options = dict(max_new_tokens=40, temperature=temperature)
    texts = graphs_and_calls(target, drafter, random_prompts(4, 9, 70, 31), engine_options=drafting, **options)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_under_penalties_and_a_bias(temperature):
    target, drafter = pair("llama")
    prompts = random_prompts(4, 9, 70, 31)
    changes = dict(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={5: 0.5, 9: -float("inf")})
    options = dict(max_new_tokens=40, temperature=temperature)
    texts = graphs_and_calls(target, drafter, prompts, **changes, **options)
    assert texts[0] == texts[1] != graphs_and_calls(target, drafter, prompts, **options)[0]
    assert not any(9 in tokens for tokens in texts[0])


def test_rows_under_penalties_join_and_leave():
    """Without a drafter and with one, in float32: the counts and the bias belong to the row that has the slot."""
    model = tiny_model("llama").to("cuda")
    drafter = DFlashDrafter.for_target(Target(model), mask_token_id=MASK_TOKEN, num_layers=2, block_size=6, taps=3)
    target, drafter = Target(model, drafter.config.target_layer_ids), drafter.to("cuda").eval()
    kinds = [{}, dict(frequency_penalty=0.5), dict(logit_bias={5: 1.0}), dict(repetition_penalty=1.4)]
    prompts = random_prompts(*(3 + i % 7 for i in range(12)))
    texts = []
    for draft in (None, drafter):
        engine = Engine(target, draft, slots=3, max_length=100)
        requests = [engine.submit(p, max_new_tokens=10, **kinds[i % 4]) for i, p in enumerate(prompts)]
        engine.run()
        texts.append([request.completion.tokens for request in requests])
    assert texts[0] == texts[1]


def test_a_graph_that_cannot_be_captured_is_made_for_fewer_rows():
    target, drafter = pair("llama")
    engine = Engine(target, drafter, slots=4, max_length=200)
    denoise = engine.cycle.draft.denoise

    def short_of_memory(rows, *others):
        if len(rows.slots) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return denoise(rows, *others)

    engine.cycle.draft.denoise = short_of_memory
    prompts = random_prompts(4, 9, 70, 31)
    requests = [engine.submit(prompt, max_new_tokens=24) for prompt in prompts]
    engine.run()
    assert {size for size, *_ in engine.runner.graphs} in ({2}, {1, 2})
    answers = [request.completion.tokens for request in requests]
    assert all(len(tokens) == 24 for tokens in answers) and regret(target.model, prompts, answers) < 0.05


def test_memory_is_given_back_and_faults_stay_with_their_requests(monkeypatch):
    monkeypatch.setattr(graphs, "MISSED", math.inf)  # the graph of all slots serves all rounds
    gc.collect()  # what earlier tests have left must not be given back meanwhile
    target, drafter = pair("qwen3")
    engine = Engine(target, drafter, slots=4, max_length=200)

    def fail(_tokens):
        raise ValueError("a callback")

    def rounds() -> None:
        requests = [
            engine.submit(p, max_new_tokens=20, on_tokens=fail if i % 3 == 0 else None)
            for i, p in enumerate(random_prompts(4, 9, 70, 31, 12, 5, 2))
        ]
        engine.step()
        engine.cancel(requests[1])
        with pytest.raises(ValueError, match="a callback"):
            engine.run()
        reasons = [request.completion.finish_reason for request in requests]
        assert reasons == ["error", "cancelled", "length", "error", "length", "length", "error"]

    rounds()
    rounds()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        rounds()
    assert torch.cuda.memory_allocated() == before


def test_logits_that_are_not_finite_end_their_row_alone():
    target, drafter = pair("llama")
    prompts = random_prompts(4, 9)
    expected = decode(target, drafter, prompts, max_new_tokens=20).completions
    assert not any(90 in [*c.tokens, *p] for c, p in zip(expected, prompts, strict=True))
    target.model.model.embed_tokens.weight[90] = float("nan")
    engine = Engine(target, drafter, slots=3, max_length=200)
    faulty = engine.submit([5, 90, 6], max_new_tokens=20)
    others = [engine.submit(prompt, max_new_tokens=20) for prompt in prompts]
    with pytest.raises(FloatingPointError, match="not finite after 0 decoded tokens"):
        engine.run()
    assert faulty.completion.finish_reason == "error" and not faulty.completion.tokens
    assert regret(target.model, prompts, [request.completion.tokens for request in others]) < 0.05


# Families whose own modules run on the engine, and whether one graph holds a cycle of theirs.
MODULES = {
    "gpt2": True,
    "glm": True,
    "stablelm": True,
    "phi3": True,
    "olmo2": True,
    "gpt_neox": True,
    "falcon": False,
    "cohere2": True,
    "gpt_oss": True,
    "gemma4_text": True,
    "deepseek_v3": True,
    "xglm": True,
}


@pytest.mark.filterwarnings("ignore:.* is decoded without CUDA graphs")
@pytest.mark.parametrize("name", MODULES)
def test_a_models_own_modules_on_the_engine(name):
    model = tiny(name).to("cuda", torch.bfloat16)
    drafter = DFlashDrafter.for_target(Target(model), mask_token_id=MASK_TOKEN, num_layers=2, block_size=6, taps=[0, 2])
    target, drafter = Target(model, [0, 2]), drafter.to("cuda", torch.bfloat16).eval()
    prompts = random_prompts(3, 40, 17, 5, 9)
    for draft in (drafter, None):
        engine = Engine(target, draft, slots=4, max_length=60)
        assert isinstance(engine.runner, GraphRunner) == MODULES[name]
        requests = [engine.submit(prompt, max_new_tokens=16) for prompt in prompts]
        engine.run()
        answers = [request.completion.tokens for request in requests]
        assert all(len(tokens) == 16 for tokens in answers) and regret(model, prompts, answers) < 0.05


@pytest.mark.parametrize(
    "wait, message",
    [
        (lambda output: bool(output[0].sum()), "called a synchronizing CUDA operation .*test_engine_gpu.py, line"),
        (lambda output: torch.cuda.synchronize(), "operation not permitted when stream is capturing"),
    ],
    ids=["seen before the capture", "within the capture"],
)
def test_modules_that_wait_for_the_device_run_without_graphs(wait, message):
    model = tiny("gpt2").to("cuda", torch.bfloat16)
    model.transformer.h[1].register_forward_hook(lambda module, given, output: output if wait(output) else output)
    prompts = random_prompts(3, 40, 17)
    with pytest.warns(UserWarning, match=f"GPT2LMHeadModel is decoded without CUDA graphs: .*{message}"):
        engine = Engine(Target(model), None, slots=2, max_length=60)
    assert torch.rand(3, device="cuda").shape == (3,)
    assert type(engine.runner) is PlainRunner
    requests = [engine.submit(prompt, max_new_tokens=16) for prompt in prompts]
    engine.run()
    assert regret(model, prompts, [request.completion.tokens for request in requests]) < 0.05
    test_a_graph_does_what_the_cycle_does(1.0)  # graphs and draws work on
