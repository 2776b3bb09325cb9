"""Speculative decoding of any transformers causal LM with a DFlash drafter, as a library.

Usage: python examples/decode.py TARGET DRAFTER_FOLDER "a prompt", TARGET being a folder, a hub name or smollm2.
"""

import sys

from dflash_ext.data import Conversation, encode
from dflash_ext.decode import decode
from dflash_ext.models import Target, load_drafter, load_target, stop_tokens

if len(sys.argv) != 4:
    sys.exit(__doc__)
target_name, drafter_folder, text = sys.argv[1:]
model, tokenizer = load_target(target_name)
drafter = load_drafter(drafter_folder, dtype=model.dtype, device=model.device)
target = Target(model, drafter.config.target_layer_ids)
prompt = encode(Conversation.user(text), tokenizer, max_prompt_tokens=2048)
stops = stop_tokens(tokenizer, model)
decoded = decode(target, drafter, [prompt], max_new_tokens=128, stop_token_ids=stops)
print(tokenizer.decode(decoded.completions[0].tokens, skip_special_tokens=True))
print(f"tau {decoded.tau:.2f}, {decoded.tokens_per_second:.1f} tokens/s")
