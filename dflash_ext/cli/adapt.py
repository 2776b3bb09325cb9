"""`dflash-ext adapt`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import console_of_this_process
from .loading import load_target, mask_token_id
from .options import (
    Accumulation,
    AttentionName,
    CheckpointActivations,
    Compile,
    CudaGraphs,
    Device,
    Dtype,
    LearningRate,
    LinearLayers,
    MaskToken,
    Overwrite,
    ReportTo,
    Resume,
    SaveEvery,
    Seed,
    Tokenizer,
    TrainerArg,
    TrainingSteps,
    linear_layer_names,
    refuse,
    shares,
)
from .output import check_folder

if TYPE_CHECKING:
    from ..noise import Share

_TEXT = typer.Option(
    metavar="<path>",
    help="A text file (a document), a JSONL file with a 'text' in each row, or a folder of such files; also .gz, .xz "
    "and .bz2. May be given several times.",
)
Text = Annotated[list[Path], _TEXT]
RowLength = Annotated[int, typer.Option(min=8, help="Tokens of a row, in which documents are packed.")]
PrefixShare = Annotated[
    str,
    typer.Option(
        metavar="<share>",
        help="The share of a document that is left as it is before the tokens to denoise; two bounds such as 0.2,0.8 "
        "are drawn between.",
    ),
]
Span = Annotated[float, typer.Option(min=1, help="The mean length of hidden spans; 1 hides single tokens.")]


def share(text: str, option: str) -> Share:
    """A share, or the bounds of one that is drawn, as an option gives it."""
    from ..noise import Share

    bounds = shares(text, option)
    return Share(*(bounds if isinstance(bounds, tuple) else (bounds, bounds)))


def adapt(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="A folder or hub name of a causal LM, or 'smollm2'.")],
    output: Annotated[Path, typer.Option(help="The folder for the adapter, its log and its plot.")],
    text: Annotated[list[Path] | None, _TEXT] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            help="A file of the model's own answers, as `dflash-ext answers` writes it, to train on instead of --text. "
            "Each prompt is a prefix, and its answer is what is denoised.",
        ),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(
            help="Who sees whom: causal (L1); prefix_block, a causal prefix and a block that sees both directions (L2);"
            " or block_causal, blocks in both directions behind a context of right tokens."
        ),
    ] = "prefix_block",
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a block, with the pattern block_causal.")
    ] = None,
    context: Annotated[
        str,
        typer.Option(
            help="With the pattern block_causal, how right tokens see each other: causal, or block_causal for blocks "
            "that see both directions."
        ),
    ] = "causal",
    noise: Annotated[
        str,
        typer.Option(
            help="What a block is trained on: masked hides tokens; uniform puts random ones in their place, as "
            "DiffusionGemma does, and trains a module that conditions a step on the one before."
        ),
    ] = "masked",
    prefix_share: PrefixShare = "0.5",
    mask_rate: Annotated[
        str | None,
        typer.Option(
            metavar="<share>",
            show_default=False,
            help="The share of a block that is hidden or replaced; two bounds such as 0.1,0.9 are drawn between. The "
            "default is 0.25, and 0.001,1 with uniform noise.",
        ),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(help="Uniform noise: the i-th token of a block weighs exp(-i / decay). By default all weigh 1."),
    ] = None,
    span: Span = 3.0,
    complementary: Annotated[
        bool,
        typer.Option("--complementary", help="Train on each row twice, the second time with the other tokens hidden."),
    ] = False,
    inverse_rate: Annotated[
        bool,
        typer.Option("--inverse-rate", help="Weigh hidden tokens by 1 / p, p being the hidden share of their block."),
    ] = False,
    ar_weight: Annotated[
        float, typer.Option(min=0, help="Add this times the loss of the next token on right tokens.")
    ] = 0.0,
    kl_weight: Annotated[
        float, typer.Option(min=0, help="Add this times the divergence from the model without the adapter.")
    ] = 0.0,
    mask_token: MaskToken = None,
    kind: Annotated[
        str,
        typer.Option(
            help="What is trained: whole, a LoRA adapter that acts on every token; gated, one that acts on the tokens "
            "of blocks alone, so that the model itself reads prompts; or full, all weights of the model, which need a "
            "lower learning rate."
        ),
    ] = "whole",
    rank: Annotated[int, typer.Option(min=1, help="The rank of the adapter.")] = 16,
    alpha: Annotated[float, typer.Option(min=0, help="The adapter's update is multiplied by alpha / rank.")] = 32.0,
    linear_layers: LinearLayers = "all",
    length: RowLength = 2048,
    steps: TrainingSteps = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
    accumulation: Accumulation = 1,
    learning_rate: LearningRate = 5e-4,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            "--held-out", metavar="<path>", help="Text to measure the loss on, as --text. The best adapter is kept."
        ),
    ] = None,
    held_out_rows: Annotated[int, typer.Option(min=1, help="The largest number of held-out rows.")] = 64,
    evaluate_every: Annotated[
        int, typer.Option(min=0, help="The number of steps between evaluations; with 0 there is one, at the end.")
    ] = 0,
    attention: AttentionName = "block_attn",
    report_to: ReportTo = None,
    trainer_arg: TrainerArg = None,
    checkpoint_activations: CheckpointActivations = False,
    compile: Compile = False,
    cuda_graphs: CudaGraphs = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    save_every: SaveEvery = 0,
    log_every: Annotated[int, typer.Option(min=1, help="The number of steps between entries of the log.")] = 10,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Turn a causal LM into a denoiser that fills in hidden tokens or replaces wrong ones."""
    from accelerate import PartialState

    from ..data import AnswerDataset, NoiseCollator, TextDataset, UniformCollator
    from ..models import Adaptation, Target, UniformAdaptation
    from ..noise import MaskNoise
    from ..progress import counted
    from ..train import RunRecipe, train_denoiser
    from ..train.arguments import trainer_arguments
    from ..train.saving import check_output

    shown = console_of_this_process()
    # Everything that does not need the model is checked before it is loaded.
    check_folder(output, model)
    if bool(text) == (answers is not None):
        raise ValueError("adapt needs either --text or --answers")
    check_output(output, resume=resume, overwrite=overwrite)
    if noise not in ("masked", "uniform"):
        raise ValueError(f"--noise {noise}: masked and uniform are supported")
    if pattern == "block_causal" and block_size is None:
        raise ValueError("--pattern block_causal needs --block-size, which is missing")
    if pattern != "block_causal" and block_size is not None:
        raise ValueError(f"--block-size goes with --pattern block_causal alone, and the pattern is {pattern}")
    if kind == "full":
        refuse(ctx, ("rank", "alpha", "linear_layers"), "is an option of adapters, and --kind full has none")
    is_uniform = noise == "uniform"
    if is_uniform and (pattern == "causal" or mask_token is not None):
        raise ValueError("with uniform noise a block sees both directions and there is no mask token")
    if decay is not None and not is_uniform:
        raise ValueError("--decay goes with --noise uniform")
    if answers is not None and not held_out:
        refuse(ctx, ("prefix_share",), "is for text, and --answers have their prompts as prefixes")
    if mask_rate is None:
        mask_rate = "0.001,1" if is_uniform else "0.25"
    drawn = share(mask_rate, "--mask-rate")
    noising = MaskNoise(drawn, 1.0 if is_uniform else span)
    options = noising, share(prefix_share, "--prefix-share"), block_size, complementary, inverse_rate
    collator = UniformCollator(*options, 1, decay) if is_uniform else NoiseCollator(*options)
    recipe = RunRecipe(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        seed=seed,
        save_every=save_every,
        evaluate_every=evaluate_every,
        log_every=log_every,
        checkpoint_activations=checkpoint_activations,
        compile=compile,
        cuda_graphs=cuda_graphs,
        report_to=tuple(report_to or ()),
        trainer_args=trainer_arguments(trainer_arg or ()),
    )
    loaded, tok = load_target(model, tokenizer, dtype, device)
    target = Target(loaded)
    target.decoder.set_attn_implementation(attention)
    if is_uniform:
        collator = replace(collator, vocab_size=target.vocab_size)
    adaptation = (UniformAdaptation if is_uniform else Adaptation).for_target(
        target,
        mask_id=None if is_uniform else mask_token_id(tok, mask_token, new=target.vocab_size),
        pattern=pattern,
        context=context,
        block_size=block_size,
        kind=kind,
        rank=rank,
        alpha=alpha,
        targets=linear_layer_names(linear_layers),
        seed=seed,
    )
    if answers is not None:
        rows = TextDataset.of_answers(AnswerDataset(answers, length, target=target), length, tok.bos_token_id)
    else:
        rows = TextDataset.of_files(text, tok, length)
    kept_out = TextDataset.of_files(held_out, tok, length).first(held_out_rows) if held_out else None
    size = sum(parameter.numel() for parameter in adaptation.parameters())
    count = len(adaptation.adapter.paths)
    what = f"{count} weights" if kind == "full" else f"{kind} adapter of rank {rank} on {count} linear layers"
    shown.print(
        f"denoiser: {what}, {size / 1e6:.1f} M parameters; "
        f"text: {counted(rows.documents, 'document')}, {counted(len(rows), 'row')} of {length} tokens",
        soft_wrap=True,
        highlight=False,
    )
    train_denoiser(
        adaptation,
        rows,
        output,
        recipe,
        collator=collator,
        held_out=kept_out,
        ar_weight=ar_weight,
        kl_weight=kl_weight,
        resume=resume,
        overwrite=overwrite,
        console=shown,
    )
    if kind == "full" and PartialState().is_main_process:
        tok.save_pretrained(output)  # the folder is that of a model of transformers
    shown.print(f"the denoiser is in {output}", soft_wrap=True, highlight=False)
