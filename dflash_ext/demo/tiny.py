"""The whole path in less than two minutes: trains a tiny target and its drafter on real text, then decodes with them.

The text is the source code of Python's standard library.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data import Conversation, encode, encode_all
from ..models import DFlashDrafter, Target
from ..progress import progress
from ..train import Recipe, train_on_prompts
from .compare import compare

VOCAB, CONTEXT = 1024, 128
TARGET_STEPS, DRAFTER_STEPS = 320, 150
ANSWERS, ANSWER_TOKENS = 160, 64


def tiny_model(console: Console) -> None:
    """Trains, decodes and prints. Raises RuntimeError if the speculative output is not the target's own."""
    console.rule("a tiny target and its drafter, trained on the spot")
    began = time.perf_counter()
    model, tokenizer, seen, unseen = trained_on_source_code(console)
    drafter = DFlashDrafter.for_target(
        Target(model), mask_token_id=tokenizer.mask_token_id, num_layers=2, block_size=8, taps=2
    )
    tapped = Target(model, drafter.config.target_layer_ids)
    with tempfile.TemporaryDirectory() as folder:
        pieces = [text[start : start + 400] for text in seen for start in range(0, len(text), 4000)]
        conversations = [Conversation(text=piece) for piece in pieces[:: max(1, len(pieces) // ANSWERS)]][:ANSWERS]
        train_on_prompts(
            drafter,
            tapped,
            encode_all(conversations, tokenizer, max_prompt_tokens=CONTEXT),
            folder,
            Recipe(steps=DRAFTER_STEPS, batch_size=8, anchors=24, optimizer="adamw", learning_rate=3e-3, log_every=50),
            max_new_tokens=ANSWER_TOKENS,
            max_length=CONTEXT,
            console=console,
        )

    prompts = {
        text.strip().splitlines()[0]: encode(Conversation(text=text[:400]), tokenizer, max_prompt_tokens=CONTEXT)
        for text in unseen[:6]
        if text.strip()
    }
    compare(console, tapped, drafter.eval(), tokenizer, prompts, max_new_tokens=64, stop_token_ids=())
    console.print(f"this part took {time.perf_counter() - began:.0f} s")


def trained_on_source_code(
    console: Console,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[str], list[str]]:
    """A causal LM and its tokenizer, the files that they have seen, and every eighth file, which they have not."""
    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    seen, unseen = [t for i, t in enumerate(texts) if i % 8], texts[::8]
    console.print(f"text: {len(seen)} files of the standard library, {sum(map(len, seen)) / 1e6:.1f} M characters")
    tokenizer = _tokenizer(seen)
    return _train_target(console, tokenizer, seen), tokenizer, seen, unseen


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<end>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts[:60], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", mask_token="<mask>")


def _train_target(console: Console, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> LlamaForCausalLM:
    """A causal LM of about 1 M parameters, trained to continue the text."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([i for text in texts for i in tokenizer(text[:30_000])["input_ids"]])
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=TARGET_STEPS, pct_start=0.1)
    losses = []
    with progress(console, "training the target", TARGET_STEPS) as advance:
        for _ in range(TARGET_STEPS):
            batch = rows[torch.randint(len(rows), (8,))]
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            advance(1)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"target: {parameters / 1e6:.1f} M parameters, loss {losses[0]:.2f} -> {losses[-1]:.2f} in {TARGET_STEPS} steps"
    )
    return model.eval().requires_grad_(False)
