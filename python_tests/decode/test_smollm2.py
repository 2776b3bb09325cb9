"""Lossless with a real model: SmolLM2-135M-Instruct, in float32, over ten prompts."""

import pytest
import torch

from dflash_ext.data import Conversation, encode
from dflash_ext.decode import decode
from dflash_ext.demo.real import DRAFTER, LORA_DRAFTER, PROMPTS
from dflash_ext.integrations.gguf import smollm2_path
from dflash_ext.models import DFlashDrafter, Target, load_pair, load_target, stop_tokens

pytestmark = pytest.mark.model
NEW = 32
MORE = [
    "What is the capital of Portugal?",
    "Write a haiku about rain.",
    "def add(a: int, b: int) -> int:\n",
    "What is 17 times 6?",
]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load_target(str(smollm2_path()), dtype=torch.float32, device=torch.device("cpu"))
    prompts = [encode(Conversation.user(text), tokenizer, max_prompt_tokens=512) for text in PROMPTS + MORE]
    assert len(prompts) == 10
    return model, prompts, stop_tokens(tokenizer, model)


def check_greedy(model, prompts, decoded, stops):
    """Every token is the likeliest one behind those before it, and an answer ends where it should.

    So the answers are the greedy ones, of which there is one to a prompt.
    """
    for prompt, completion in zip(prompts, decoded.completions, strict=True):
        tokens = completion.tokens
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        assert len(tokens) == NEW or tokens[-1] in stops
        assert not set(tokens[:-1]) & set(stops)


@pytest.mark.parametrize(
    "folder, options, count, tau",
    [(DRAFTER, {}, 10, 1.8), (LORA_DRAFTER, {"forwards": 2}, 5, 2.0), (LORA_DRAFTER, {"groups": 7}, 5, 1.5)],
)
def test_the_shipped_drafters_are_lossless_and_accepted(smollm2, folder, options, count, tau):
    model, prompts, stops = smollm2
    options = dict(max_new_tokens=NEW, stop_token_ids=stops, batch_size=5) | options
    decoded = decode(*load_pair(model, folder), prompts[:count], **options)
    check_greedy(model, prompts[:count], decoded, stops)
    assert decoded.tau > tau


def test_a_random_drafter_is_lossless(smollm2):
    model, prompts, stops = smollm2
    torch.manual_seed(0)
    drafter = DFlashDrafter.for_target(Target(model), mask_token_id=16, num_layers=1, intermediate_size=64).eval()
    target = Target(model, drafter.config.target_layer_ids)
    options = dict(max_new_tokens=NEW, stop_token_ids=stops, block_size=4)
    decoded = decode(target, drafter, prompts[-3:], **options)
    check_greedy(model, prompts[-3:], decoded, stops)
    assert decoded.tau < 1.1


def test_generate_gives_the_same(smollm2):
    model, prompts, stops = smollm2
    ids = torch.tensor([prompts[0]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    (completion,) = decode(Target(model), None, prompts[:1], max_new_tokens=NEW, stop_token_ids=stops).completions
    assert out[0, len(prompts[0]) :].tolist() == completion.tokens
