"""Lossless with a real model: SmolLM2-135M-Instruct, in float32, over 20 prompts."""

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
    "Name four fruits that are red.",
    "Write a haiku about rain.",
    "Translate 'good morning' into French.",
    "A train travels 60 miles in 1.5 hours. What is its speed?",
    "List the steps to make a cup of tea.",
    "def add(a: int, b: int) -> int:\n",
    "Summarise: The cat sat on the mat because the floor was cold.",
    "Who wrote Romeo and Juliet?",
    "Give me a sentence with the word 'lantern'.",
    "What is 17 times 6?",
    "Why do leaves change colour in autumn?",
    "Suggest a name for a bakery.",
    "for i in range(10):\n",
]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load_target(str(smollm2_path()), dtype=torch.float32, device=torch.device("cpu"))
    prompts = [encode(Conversation.user(text), tokenizer, max_prompt_tokens=512) for text in PROMPTS + MORE]
    assert len(prompts) == 20
    return model, prompts, stop_tokens(tokenizer, model)


@pytest.fixture(scope="module")
def own_output(smollm2):
    model, prompts, stops = smollm2
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize(
    "folder, options, tau",
    [(DRAFTER, {}, 1.8), (LORA_DRAFTER, {"forwards": 2}, 2.0), (LORA_DRAFTER, {"forwards": 1}, 1.5)],
)
def test_the_shipped_drafters_are_lossless_and_accepted(smollm2, own_output, folder, options, tau):
    model, prompts, stops = smollm2
    decoded = decode(
        *load_pair(model, folder), prompts, max_new_tokens=NEW, stop_token_ids=stops, batch_size=5, **options
    )
    assert [c.tokens for c in decoded.completions] == own_output
    assert decoded.tau > tau


def test_a_random_drafter_is_lossless(smollm2, own_output):
    model, prompts, stops = smollm2
    torch.manual_seed(0)
    drafter = DFlashDrafter.for_target(Target(model), mask_token_id=16, num_layers=1, intermediate_size=64).eval()
    target = Target(model, drafter.config.target_layer_ids)
    decoded = decode(target, drafter, prompts, max_new_tokens=NEW, stop_token_ids=stops, batch_size=10, block_size=4)
    assert [c.tokens for c in decoded.completions] == own_output
    assert decoded.tau < 1.1
