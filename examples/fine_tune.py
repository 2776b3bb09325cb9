"""Trains all weights of a causal LM on text: `fine_tune.py MODEL OUTPUT --text FILE`.

The folder OUTPUT holds the model and its tokenizer. Such a model may verify what a drafter for MODEL drafts
(`dflash-ext evaluate --target OUTPUT --drafter-base MODEL`). Documents are packed into rows, and see no other document.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from dflash_ext.data import TextDataset, read_texts
from dflash_ext.models import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    given = parser.parse_args()
    model, tokenizer = load_target(given.model, dtype=torch.float32)
    model.train().requires_grad_(True)
    rows = TextDataset(read_texts(given.text), tokenizer, given.length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, given.steps // 25, given.steps)
    for step in range(given.steps):
        batch = [rows[order[(step * given.batch_size + row) % len(rows)]] for row in range(given.batch_size)]
        ids = torch.stack([row["input_ids"] for row in batch]).to(model.device)
        # Positions start anew with each document, from which transformers makes masks that keep documents apart.
        starts = [torch.cat([row["starts"], torch.tensor([given.length])]) for row in batch]
        positions = torch.stack([torch.cat([torch.arange(size) for size in start.diff()]) for start in starts])
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions.to(model.device), use_cache=False).logits
        is_last = (positions[:, 1:] == 0).to(model.device)  # of its document, so that nothing follows
        labels = ids[:, 1:].masked_fill(is_last, -100)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step + 1 == given.steps:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()
