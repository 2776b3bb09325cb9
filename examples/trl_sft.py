"""Supervised fine-tuning by TRL's SFTTrainer, with LoRA, on packed documents under `block_attn`.

TRL joins short documents to rows of `max_length` tokens and lets positions begin anew at each of them. transformers
makes the mask of such rows, and `block_attn` runs it as intervals: no document sees another one.

Usage: python examples/trl_sft.py MODEL TEXTS OUTPUT
"""

import sys

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dflash_ext.integrations  # noqa: F401  registers "block_attn"


def make_trainer(name: str, texts: str, output: str, steps: int = 100, max_length: int = 1024) -> SFTTrainer:
    """A trainer of the model `name` on `texts`, a file of JSON lines with a field "text"."""
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="block_attn", dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=output,
        packing=True,  # rows hold several documents
        max_length=max_length,
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=max(1, steps // 10),
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.load_dataset("json", data_files=texts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


if __name__ == "__main__":
    trainer = make_trainer(*sys.argv[1:4])
    trainer.train()
    trainer.save_model()  # the adapter, in safetensors
