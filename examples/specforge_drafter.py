"""Measures a drafter that SpecForge has trained.

Usage: python examples/specforge_drafter.py CHECKPOINT DRAFT_CONFIG DRAFTER TARGET PROMPTS
Options of `dflash-ext evaluate` may follow.

SpecForge keeps a drafter in its output folder, CHECKPOINT, as a pickle. Its own exporter reads that, together with
DRAFT_CONFIG, the config file that the drafter was trained with, and writes the folder DRAFTER: `config.json` and
safetensors. If DRAFTER exists, it is taken as it is.
"""

import sys
from pathlib import Path

from dflash_ext.cli import app

if len(sys.argv) < 6:
    sys.exit(__doc__)
checkpoint, draft_config, drafter, target, prompts, *options = sys.argv[1:]
if not Path(drafter).exists():
    from specforge.export.to_hf import export_to_hf  # pip install --no-deps specforge==0.2.0

    export_to_hf(checkpoint, draft_config, drafter)
app(["evaluate", "--target", target, "--drafter", drafter, "--prompts", prompts, *options])
