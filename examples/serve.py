"""Serves a target with a drafter that this package has written, by vLLM or SGLang: `serve.py vllm TARGET DRAFTER`."""

import os
import shlex
import sys

import torch

from dflash_ext.models import DFlashConfig

server, target, drafter = sys.argv[1:4]
slots = DFlashConfig.from_pretrained(drafter).block_size
commands = {
    "vllm": ["vllm", "serve", target, "--speculative-config"]
    + [f'{{"method": "dflash", "model": "{drafter}", "num_speculative_tokens": {slots - 1}}}'],
    "sglang": [sys.executable, "-m", "sglang.launch_server", "--model-path", target]
    + ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", drafter],
}
print(shlex.join(commands[server]), flush=True)
if not torch.cuda.is_available():
    sys.exit(f"{server} decodes with a drafter on a GPU alone, and here is none")
os.execvp(commands[server][0], commands[server])
