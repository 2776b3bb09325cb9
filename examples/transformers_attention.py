"""A causal language model of transformers reads a block in both directions: only its attention mask changes."""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from dflash_ext import IntervalMask
from dflash_ext.integrations import register

register()  # the import has done this already: "block_attn" is now an attention implementation
shape = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
config = Qwen3Config(vocab_size=1000, num_hidden_layers=4, **shape)
model = AutoModelForCausalLM.from_config(config, attn_implementation="block_attn")  # or from_pretrained

prefix, block = 48, 16
tokens = torch.randint(1, config.vocab_size, (2, prefix + block))
mask = IntervalMask.prefix_block(prefix + block, prefix)  # a causal prefix, then a bidirectional block
noised = tokens.clone()
noised[:, prefix + 1 :] = 0  # 0 stands for a mask token; the block's first token stays
logits = model(noised, interval_mask=mask).logits[:, prefix + 1 :]
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, prefix + 1 :].flatten())
loss.backward()
print(f"denoising loss {loss:.3f}")

changed = noised.clone()
changed[:, -1] = 1
for name, given in (("block", {"interval_mask": mask}), ("causal", {})):
    before, after = (model(ids, **given).logits[:, prefix] for ids in (noised, changed))
    moved = (after - before).abs().max()
    print(f"{name}: changing the block's last token changes the logits of its first by {moved:.4f}")
