"""What `dflash-ext doctor --drafter` finds: whether a drafter is read as it was trained, and whether decoding agrees.

A published drafter that is read wrongly drafts badly without any error. So each reading that could be meant is tried on
the target's own answers, and the one with the best tau is named.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .decode import Drafter, decode
from .models import DFlashDrafter, LoraDrafter, Target
from .train import AnchorCollator
from .train.objectives import DFlashObjective, LoraObjective
from .train.tau import TauOfBlocks

AS_CONFIGURED = "as its config says"
BETTER = 1.1  # times the tau of the config's own reading; another reading must reach this to be named as the right one
USEFUL = 1.3  # the least tau that says anything of a reading: some tokens are right by chance
FAR_BELOW = 0.8  # of the tau that the accuracy of the slots implies


@dataclass
class Findings:
    """What `examine` found.

    Attributes:
        readings: the teacher-forced tau of each reading, by its name; the config's own is `AS_CONFIGURED`.
        accuracy: of each drafted slot under the config's own reading, the share of right tokens, over all blocks.
        decoded_tau: tokens per cycle of decoding the same prompts.
        logit_difference: the largest difference between the drafter's logits as it is trained and as it decodes,
            relative to the largest logit. A LoRA drafter's are not compared: its rows are the target's own in both.
        dtype: of the target and the drafter.
    """

    readings: dict[str, float]
    accuracy: list[float]
    decoded_tau: float
    logit_difference: float | None
    dtype: torch.dtype

    @property
    def best(self) -> str:
        """The reading to use: the config's own unless another one drafts something, and clearly better."""
        name = max(self.readings, key=self.readings.__getitem__)
        return name if self.readings[name] > max(USEFUL, BETTER * self.readings[AS_CONFIGURED]) else AS_CONFIGURED

    @property
    def implied_tau(self) -> float:
        """The tau of a drafter whose slots are right independently of each other, with these accuracies."""
        return 1 + sum(math.prod(self.accuracy[: slot + 1]) for slot in range(len(self.accuracy)))

    def warnings(self) -> list[str]:
        said = []
        if self.best != AS_CONFIGURED:
            best, own = self.readings[self.best], self.readings[AS_CONFIGURED]
            said.append(f"the drafter fits {self.best}: tau {best:.2f} instead of {own:.2f}; its config should say so")
        elif (most := max(self.readings.values())) <= USEFUL:
            said.append(
                f"no reading has a tau above {most:.2f}: the drafter was hardly trained, or for another model, such as "
                "a denoiser of this target"
            )
        if self.decoded_tau < FAR_BELOW * self.implied_tau:
            said.append(
                f"tau is {self.decoded_tau:.2f}, and the accuracy of the slots implies {self.implied_tau:.2f}: "
                "decoding gives the drafter something else than training did"
            )
        if self.logit_difference is not None and self.logit_difference > 10 * torch.finfo(self.dtype).eps ** 0.75:
            said.append(f"training and decoding give different logits (by {self.logit_difference:.1e} of the largest)")
        return said


def examine(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, Sequence[Sequence[int]]],
    *,
    max_new_tokens: int = 64,
    stop_token_ids: Sequence[int] = (),
    on_reading: Callable[[str, int], None] = lambda *_: None,
) -> Findings:
    """Tries the readings of a drafter on the target's own greedy answers.

    Args:
        target: tapped at the drafter's layers.
        prompts: token ids, by the way in which they were encoded; the first way is the user's own.
        max_new_tokens: the largest number of tokens in an answer.
        stop_token_ids: tokens that end an answer.
        on_reading: called with the name of each reading before it is tried, and the number of readings.
    """
    is_lora = isinstance(drafter, LoraDrafter)
    others = lora_readings(target, drafter) if is_lora else other_readings(target, drafter, tokenizer)
    own = [(AS_CONFIGURED, target, drafter), *others]
    total = len(own) + len(prompts) - 1
    limits = {"max_new_tokens": max_new_tokens, "stop_token_ids": stop_token_ids}
    readings: dict[str, float] = {}
    for way, asked in prompts.items():
        answers = decode(Target(target.model), None, asked, **limits).completions
        texts = [(list(prompt), answer.tokens) for prompt, answer in zip(asked, answers, strict=True)]
        if readings:
            on_reading(way, total)
            readings[way], _ = teacher_forced(target, drafter, texts)
            continue
        for name, tapped, read in own:
            on_reading(name, total)
            readings[name], right = teacher_forced(tapped, read, texts)
            if name == AS_CONFIGURED:
                accuracy = right
        committed = [answer.committed for answer in decode(target, drafter, asked, forwards=2, **limits).completions]
        decoded_tau = sum(map(sum, committed)) / max(sum(map(len, committed)), 1)
        difference = None if is_lora else _logit_difference(target, drafter, texts[0])
    return Findings(readings, accuracy, decoded_tau, difference, target.dtype)


@torch.no_grad()
def teacher_forced(
    target: Target, drafter: Drafter, texts: Sequence[tuple[list[int], list[int]]]
) -> tuple[float, list[float]]:
    """Tau, as decoding has it, on prompts with the target's greedy answers, and the accuracy of each drafted slot."""
    config, tau = drafter.config, TauOfBlocks()
    if isinstance(drafter, LoraDrafter):
        objective, first_slot, random_tokens = LoraObjective(drafter, target), 1, 0
    else:
        objective, first_slot = DFlashObjective(drafter, target), config.first_draft_slot
        random_tokens = target.vocab_size if config.noise == "uniform" else 0
    longest = max(len(answer) for _, answer in texts)
    collate = AnchorCollator(longest, config.block_size, config.mask_token_id, first_slot, random_tokens=random_tokens)
    right = counted = 0
    for index, (prompt, answer) in enumerate(texts):
        ids = torch.tensor(prompt + answer)
        sample = {"input_ids": ids, "loss_mask": torch.arange(len(ids)) >= len(prompt), "key": (0, 0, index)}
        batch = {name: value.to(target.device) for name, value in collate([sample]).items()}
        result = objective(batch, *objective.of_target(batch))
        tau.add(batch, result)
        counts, correct = result.counts, result.correct
        right, counted = right + (correct & counts).sum(dim=(0, 1)), counted + counts.sum(dim=(0, 1))
    tokens, cycles = tau.take().tolist()
    return tokens / max(cycles, 1), (right / counted.clamp(min=1)).tolist()


def other_readings(
    target: Target, drafter: DFlashDrafter, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Target, DFlashDrafter]]:
    """The drafter under other configs that its publisher may have meant, each with the target tapped for it."""
    config = drafter.config
    for shift in (-1, 1):
        taps = [tap + shift for tap in config.target_layer_ids]
        if 0 <= min(taps) and max(taps) < target.num_layers:
            dflash = config.dflash_config | {"target_layer_ids": taps}
            yield f"taps shifted by {shift:+d}", Target(target.model, taps), _read_as(drafter, dflash_config=dflash)
    if config.noise == "mask":  # random tokens know no mask token, and no draft at the anchor
        kinds = {getattr(tokenizer, f"{kind}_token_id"): kind for kind in ("eos", "unk", "pad", "mask")}
        for token in kinds.keys() - {None, config.mask_token_id}:
            dflash = config.dflash_config | {"mask_token_id": token}
            name = f"mask token {token}, the tokenizer's {kinds[token]} token"
            yield name, target, _read_as(drafter, dflash_config=dflash)
        other = not config.sample_from_anchor
        said = "labels that begin at the anchor" if other else "labels that begin behind the anchor"
        yield f"{said} (sample_from_anchor is {other})", target, _read_as(drafter, sample_from_anchor=other)
    for is_causal in (False, True):
        if any(causal != is_causal for _, causal, _ in config.attention_kinds()):
            kind = "causal" if is_causal else "bidirectional"
            yield f"{kind} attention within a block", target, _read_as(drafter, is_causal=is_causal)
    if "sliding_attention" in config.layer_types:
        kinds = {"layer_types": ["full_attention"] * len(config.layer_types), "is_causal": False}
        yield "no sliding window", target, _read_as(drafter, **kinds)
        convention = "zlab" if config.window_convention == "speculators" else "speculators"
        yield f"windows as in {convention}", target, _read_as(drafter, window_convention=convention)
    theirs = dict(getattr(target.config, "rope_parameters", None) or {})
    if theirs.get("rope_theta") and theirs["rope_theta"] != config.rope_parameters.get("rope_theta"):
        rope = config.rope_parameters | {"rope_theta": theirs["rope_theta"]}
        yield f"the target's rope_theta, {theirs['rope_theta']:g}", target, _read_as(drafter, rope_parameters=rope)


def lora_readings(target: Target, drafter: LoraDrafter) -> Iterator[tuple[str, Target, LoraDrafter]]:
    """A LoRA drafter under other configs that its publisher may have meant."""
    config = drafter.config
    other = "whole" if config.kind == "gated" else "gated"
    changes = {
        f"{'bidirectional' if config.causal else 'causal'} attention within a block": {"causal": not config.causal},
        f"an adapter of the other kind, {other}": {"kind": other},
    }
    for name, changed in changes.items():
        read = copy.copy(drafter)
        read.config = replace(config, **changed)
        yield name, target, read


def _read_as(drafter: DFlashDrafter, **changes) -> DFlashDrafter:
    """The same weights under a changed config."""
    config = copy.deepcopy(drafter.config)
    for name, value in changes.items():
        setattr(config, name, value)
    read = copy.copy(drafter)
    read.config = config
    read._modules = dict(drafter._modules)
    read.rotary_emb = type(drafter.rotary_emb)(config).to(drafter.device)
    return read


@torch.no_grad()
def _logit_difference(target: Target, drafter: DFlashDrafter, text: tuple[list[int], list[int]]) -> float:
    """How far the logits of one forward over blocks at several anchors are from those of a forward for each block."""
    prompt, answer = text
    ids = torch.tensor([prompt + answer], device=target.device)
    config, length = drafter.config, ids.shape[1]
    anchors = torch.arange(len(prompt), length, device=target.device)[None, :8]
    slots = torch.arange(config.block_size, device=target.device)
    noise = torch.full((1, anchors.shape[1], config.block_size), config.mask_token_id, device=target.device)
    noise[:, :, 0] = ids.gather(1, anchors)
    features = target.features(ids)
    positions = torch.arange(length, device=target.device)[None]

    def logits(context: Tensor, blocks: Tensor, at: Tensor, masks: dict | None) -> Tensor:
        hidden = drafter(
            noise_embeds=drafter.embed(target, blocks.flatten(1)),
            context_hidden_states=context,
            position_ids=torch.cat([positions[:, : context.shape[1]], (at[:, :, None] + slots).flatten(1)], dim=1),
            attention_mask=masks,
        ).last_hidden_state
        return drafter.logits(target, hidden).float()

    together = logits(features, noise, anchors, drafter.anchor_masks(length, anchors))
    alone = [
        logits(features[:, : int(anchors[0, n])], noise[:, n : n + 1], anchors[:, n : n + 1], None)
        for n in range(anchors.shape[1])
    ]
    alone = torch.cat(alone, dim=1)
    finite = together.isfinite()
    return float((together - alone)[finite].abs().max() / together[finite].abs().max())


def report(findings: Findings, console: Console) -> None:
    """Prints the readings from the best to the worst, the accuracy of the slots, and what is wrong."""
    table = Table("reading of the drafter", "tau", caption="teacher-forced, on the target's own answers")
    for name, tau in sorted(findings.readings.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{tau:.2f}", style="bold" if name == findings.best else None)
    console.print(table)
    shares = " ".join(f"{100 * share:.0f}" for share in findings.accuracy)
    console.print(f"right tokens by slot, %: {shares}", soft_wrap=True)
    said = f"tau of decoding {findings.decoded_tau:.2f}, implied by these shares {findings.implied_tau:.2f}"
    if findings.logit_difference is not None:
        said += f"; logits of training and decoding differ by {findings.logit_difference:.1e} of the largest"
    console.print(said, soft_wrap=True)
    for warning in findings.warnings():
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if not findings.warnings():
        console.print("nothing is wrong with this drafter")
