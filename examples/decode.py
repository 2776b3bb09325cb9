"""Speculative decoding of a transformers causal LM with a DFlash drafter, by the library's functions.

Usage: python examples/decode.py TARGET DRAFTER "a prompt"
TARGET is a folder, a name on the hub or smollm2. DRAFTER is a folder or a name on the hub.
"""

import sys

from dflash_ext.data import Conversation, encode
from dflash_ext.decode import decode
from dflash_ext.models import Target, load_drafter, load_target, stop_tokens

if len(sys.argv) != 4:
    sys.exit(__doc__)
target_name, drafter_name, text = sys.argv[1:]
model, tokenizer = load_target(target_name)
drafter = load_drafter(drafter_name, dtype=model.dtype, device=model.device)
target = Target(model, drafter.config.target_layer_ids)
prompt = encode(Conversation.user(text), tokenizer, max_prompt_tokens=2048)
stops = stop_tokens(tokenizer, model)
decoded = decode(target, drafter, [prompt], max_new_tokens=128, stop_token_ids=stops)
print(tokenizer.decode(decoded.completions[0].tokens, skip_special_tokens=True))
print(f"tau {decoded.tau:.2f}, {decoded.tokens_per_second:.1f} tokens/s")
