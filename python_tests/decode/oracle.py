"""What a target decodes by itself, and a drafter that knows it."""

import hashlib
import random
from collections.abc import Sequence

import torch

from dflash_ext.models import DFlashDrafter
from python_tests.tiny import MASK_TOKEN

_known: dict[tuple, list[int]] = {}  # many tests ask for the output of the same tiny models


def own_outputs(model, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """What the target itself decodes greedily behind each prompt: `generate`, with the prompts side by side."""
    numbers = hashlib.sha256(model.config.to_json_string().encode())
    for tensor in model.state_dict().values():
        numbers.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    key = type(model), model.config._attn_implementation, numbers.digest()
    if unknown := [prompt for prompt in prompts if len(_known.get((*key, *prompt), ())) < count]:
        longest = max(map(len, unknown))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in unknown])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in unknown])
        options = dict(do_sample=False, eos_token_id=None, attention_mask=mask)
        answers = model.generate(ids, max_new_tokens=count, **options)[:, longest:].tolist()
        _known.update(((*key, *prompt), answer) for prompt, answer in zip(unknown, answers, strict=True))
    return [_known[*key, *prompt][:count] for prompt in prompts]


def own_output(model, prompt: list[int], count: int) -> list[int]:
    """The same behind one prompt."""
    return own_outputs(model, [prompt], count)[0]


class Oracle(DFlashDrafter):
    """Drafts the known continuation of each row, wrong at one position in `period`, by chance."""

    def script(self, prompts: list[list[int]], answers: list[list[int]], *periods: int) -> None:
        """Takes one period for all prompts or one each; `prompts` are sorted by length, as rows are."""
        self.texts = [p + a for p, a in zip(prompts, answers, strict=True)]
        self.reached = [len(p) for p in prompts]  # one more than the position of each prompt's anchor
        self.periods = periods if len(periods) > 1 else periods * len(prompts)

    def on_tokens(self, index: int, tokens: list[int]) -> None:
        self.reached[index] += len(tokens)

    def decode_masks(self, cache_lens, block_len, kv_len):
        self.starts = cache_lens.tolist()
        return super().decode_masks(cache_lens, block_len, kv_len)

    def logits(self, target, hidden, head=None):
        logits = torch.zeros(*hidden.shape[:2], target.vocab_size)
        waiting = list(range(len(self.texts)))
        for row, start in enumerate(self.starts):
            index = next((i for i in waiting if self.reached[i] - 1 == start), None)
            if index is None:  # an ended row that rides along
                continue
            waiting.remove(index)
            for slot in range(hidden.shape[1]):
                token = self.texts[index][start + 1 + slot]
                wrong = random.Random(start + slot).random() < 1 / self.periods[index]
                logits[row, slot, (token + 1) % MASK_TOKEN if wrong else token] = 9.0
        return logits
