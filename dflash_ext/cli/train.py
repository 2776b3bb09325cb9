"""`dflash-ext train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import console_of_this_process
from .loading import load_target, mask_token_id, to_answer
from .options import (
    Accumulation,
    AnswersAtATime,
    AnswerTemperatures,
    AtLeastTwoNewTokens,
    ChatTemplateArgs,
    CheckpointActivations,
    Compile,
    CudaGraphs,
    Device,
    Dtype,
    Field,
    Limit,
    MaskToken,
    MaxLength,
    MaxPromptTokens,
    Overwrite,
    Prompts,
    ReportTo,
    Resume,
    SaveEvery,
    Seed,
    ServerModel,
    ServerUrl,
    Taps,
    TargetName,
    Tokenizer,
    TrainerArg,
    TrainingSteps,
    integer,
    linear_layer_names,
    refuse,
    shares,
    tap_choice,
)
from .output import check_folder

if TYPE_CHECKING:
    from ..models import Denoiser, Target

# The options that only one kind of drafter has, by the names of their parameters.
OPTIONS_OF = {
    "dflash": (
        *("layers", "taps", "intermediate_size", "features", "loss", "teacher_mix", "compile"),
        *("noise", "denoiser", "sample_from_anchor"),
    ),
    "lora": (
        *("lora_kind", "rank", "alpha", "linear_layers", "causal", "sampler_width"),
        *("kl_weight", "context_ratio", "fixed_anchors", "forwards", "cuda_graphs", "tensor_parallel"),
    ),
}


def train(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option(help="The folder for the drafter, its log and the answers.")],
    target: TargetName,
    denoiser: Annotated[
        Path | None,
        typer.Option(
            metavar="<folder>",
            help="Train for this denoiser of uniform noise, which `dflash-ext adapt --noise uniform` wrote, instead of "
            "the target, which is its base. The drafter then drafts the denoiser's canvases.",
        ),
    ] = None,
    drafter: Annotated[
        str,
        typer.Option(
            help="The kind of the drafter: dflash, a small model of its own; or lora, an adapter with which the target "
            "drafts for itself."
        ),
    ] = "dflash",
    prompts: Prompts = None,
    answers: Annotated[
        Path | None, typer.Option(help="Train on this answers file of an earlier run instead of new answers.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="The folder that `dflash-ext features` wrote for these --answers.")
    ] = None,
    server: ServerUrl = None,
    server_model: ServerModel = None,
    field: Field = None,
    limit: Limit = None,
    max_prompt_tokens: MaxPromptTokens = 512,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: AtLeastTwoNewTokens = 256,
    temperature: AnswerTemperatures = None,
    decode_batch: AnswersAtATime = 32,
    mask_token: MaskToken = None,
    layers: Annotated[int, typer.Option(min=1, help="The number of the drafter's layers.")] = 5,
    taps: Taps = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Slots of a drafted block, the anchor included. The default is 16, and 8 for a LoRA drafter."
        ),
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(min=1, help="The width of the drafter's MLPs. The default is the target's.")
    ] = None,
    lora_kind: Annotated[
        str,
        typer.Option(
            help="With --drafter lora: gated, the adapter acts on mask tokens alone and the target's cache serves "
            "both; or whole, it acts on every token while drafting."
        ),
    ] = "gated",
    rank: Annotated[int, typer.Option(min=1, help="With --drafter lora: the rank of the adapter.")] = 64,
    alpha: Annotated[
        float | None,
        typer.Option(help="With --drafter lora: updates are multiplied by alpha / rank. The default is the rank."),
    ] = None,
    linear_layers: Annotated[
        str,
        typer.Option(
            metavar="<names>",
            help="With --drafter lora: the linear layers of the adapter: all, attention, mlp, or names such as "
            "q_proj,o_proj.",
        ),
    ] = "all",
    causal: Annotated[
        bool,
        typer.Option("--causal", help="With --drafter lora: a slot of a block sees only the slots up to itself."),
    ] = False,
    sampler_width: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --drafter lora: train a sampler head of this width, which lets a drafted token depend on the "
            "one before it.",
        ),
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            metavar="<folder>",
            help="Begin with the weights of this drafter, which is of the same kind and shape. The rank of a LoRA "
            "drafter may be larger: its updates are then reduced.",
        ),
    ] = None,
    steps: TrainingSteps = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward pass.")] = 8,
    accumulation: Accumulation = 1,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks drawn from each sequence.")] = 64,
    max_length: MaxLength = 1024,
    sample_from_anchor: Annotated[
        bool,
        typer.Option(
            "--sample-from-anchor",
            help="The slot of the anchor drafts, too: each slot predicts the token behind its own. vLLM and "
            "transformers do not read such drafters.",
        ),
    ] = False,
    noise: Annotated[
        str,
        typer.Option(
            help="What stands in the slots that are drafted: mask, the mask token; or uniform, random tokens, which "
            "each step of denoising draws anew. For several steps, --noise-ratio must be below 1."
        ),
    ] = "mask",
    noise_ratio: Annotated[
        float,
        typer.Option(
            help="The share of blocks that are drafted from mask tokens alone. The others show some leading tokens, "
            "which trains for several steps of denoising; with --noise uniform, tokens in any slots. With --drafter "
            "lora, the share of slots that hold the mask token; the others show their tokens."
        ),
    ] = 1.0,
    curriculum: Annotated[
        str | None,
        typer.Option(
            metavar="<sizes>",
            help="Block sizes of equal parts of the training, such as 4,8,16. The default is one size.",
        ),
    ] = None,
    pack_length: Annotated[
        int | None,
        typer.Option(
            "--pack",
            min=4,
            help="Put several sequences into rows of this number of tokens. No sequence sees another one.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The peak learning rate, which a cosine decay to 0 follows. The default is 5e-3 with muon and 6e-4 "
            "with adamw.",
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(help="The optimizer: muon, which is for matrices, and steps all else by AdamW; or adamw."),
    ] = "muon",
    loss: Annotated[
        str,
        typer.Option(
            help="The loss: ce, the cross-entropy of the target's tokens; kl or tv, the divergence or the total "
            "variation from the target's distributions."
        ),
    ] = "ce",
    teacher_mix: Annotated[
        float, typer.Option(help="The share of kl or tv in the loss; the rest is the cross-entropy.")
    ] = 1.0,
    kl_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --drafter lora: the weight of the divergence from the target's distributions, beside the "
            "cross-entropy of its tokens.",
        ),
    ] = 0.0,
    context_ratio: Annotated[
        str,
        typer.Option(
            metavar="<share>",
            help="With --drafter lora: the share of each sequence that is context alone and has no block. Two shares, "
            "such as 0.1,0.6, draw it for each sequence.",
        ),
    ] = "0",
    fixed_anchors: Annotated[
        bool,
        typer.Option("--fixed-anchors", help="With --drafter lora: put blocks side by side instead of drawing them."),
    ] = False,
    forwards: Annotated[
        int,
        typer.Option(
            min=1,
            max=2,
            help="With --drafter lora: the forwards of the decoding cycles that the weights of the loss, and the "
            "evaluations, are for.",
        ),
    ] = 2,
    cuda_graphs: CudaGraphs = False,
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="With --drafter lora and --answers: the processes of torchrun share each layer of the target, instead "
            "of training on sequences of their own.",
        ),
    ] = False,
    gamma: Annotated[
        float | None,
        typer.Option(help="The decay of the loss weights over a block's slots. Without it, D-PACE weights are used."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(min=0, max=0.5, help="The share of the conversations that is kept for evaluation."),
    ] = 0.02,
    evaluate_every: Annotated[
        int,
        typer.Option(
            min=0,
            help="The number of steps between evaluations, which decode held-out prompts; with 0 there is one, at the "
            "end. The drafter with the best tau is kept.",
        ),
    ] = 0,
    evaluate_prompts: Annotated[
        int, typer.Option(min=1, help="The largest number of held-out prompts that an evaluation decodes.")
    ] = 32,
    report_to: ReportTo = None,
    trainer_arg: TrainerArg = None,
    checkpoint_activations: CheckpointActivations = False,
    compile: Compile = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    save_every: SaveEvery = 0,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Train a drafter on a target's own answers to your prompts."""
    import torch
    from accelerate import PartialState

    from ..data import LeftOut, read_conversations
    from ..data.parsing import require_file
    from ..models import Target, load_denoiser, load_drafter, load_lora_drafter
    from ..progress import counted
    from ..train import LoraRecipe, Recipe, new_drafter, new_lora_drafter, train_on_answers, train_on_prompts
    from ..train.arguments import trainer_arguments
    from ..train.saving import check_output

    _check_kind(ctx, drafter)
    is_lora = drafter == "lora"
    if (prompts is None) == (answers is None):
        raise ValueError("train needs either --prompts, which the target answers first, or --answers")
    if server and answers:
        raise ValueError("--server answers prompts, and --answers has answers already: only one of them may be given")
    if tensor_parallel and not answers:
        raise ValueError("--tensor-parallel is for training on --answers, which must be given, too")
    if features and not answers:
        raise ValueError("--features are features of --answers, which must be given, too")
    shown = console_of_this_process()
    # Everything that does not need the target is checked before it is loaded.
    left_out = LeftOut()
    if answers is None:
        conversations = read_conversations(prompts, field=field, limit=limit, left_out=left_out)
    else:
        require_file(answers)
    check_folder(output, target)
    check_output(output, resume=resume, overwrite=overwrite)
    chosen_taps = tap_choice(taps)
    block_size = (8 if is_lora else 16) if block_size is None else block_size
    settings = dict(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        anchors=anchors,
        noise_ratio=noise_ratio,
        block_sizes=tuple(integer(size, "--curriculum") for size in curriculum.split(",")) if curriculum else (),
        pack_length=pack_length,
        learning_rate=learning_rate,
        optimizer=optimizer,
        gamma=gamma,
        seed=seed,
        save_every=save_every,
        evaluate_every=evaluate_every,
        evaluate_prompts=evaluate_prompts,
        report_to=tuple(report_to or ()),
        trainer_args=trainer_arguments(trainer_arg or ()),
        checkpoint_activations=checkpoint_activations,
    )
    if is_lora:
        ratio = shares(context_ratio, "--context-ratio")
        options = dict(kl_weight=kl_weight, context_ratio=ratio, fixed_anchors=fixed_anchors, forwards=forwards)
        recipe = LoraRecipe(**settings, **options, cuda_graphs=cuda_graphs, tensor_parallel=tensor_parallel)
    else:
        recipe = Recipe(**settings, loss=loss, teacher_mix=teacher_mix, compile=compile)
    model, tok = load_target(target, tokenizer, dtype, device)
    if denoiser is not None:
        model = _target_of_canvases(load_denoiser(model, denoiser)).model
    made = dict(mask_token_id=mask_token_id(tok, mask_token), block_size=block_size)
    if is_lora:
        trained = new_lora_drafter(
            Target(model),
            seed,
            kind=lora_kind,
            rank=rank,
            alpha=alpha,
            targets=linear_layer_names(linear_layers),
            causal=causal,
            sampler_width=sampler_width,
            **made,
        )
        tapped = Target(model)
        what = f"a {lora_kind} adapter of rank {rank} on {len(trained.adapter.paths)} linear layers"
    else:
        options = dict(num_layers=layers, taps=chosen_taps, intermediate_size=intermediate_size, noise=noise)
        options["sample_from_anchor"] = sample_from_anchor
        trained = new_drafter(Target(model), seed, **options, **made)
        tapped = Target(model, trained.config.target_layer_ids)
        what = f"{counted(layers, 'layer')}, taps {trained.config.target_layer_ids}"
    if start_from is not None:
        if is_lora:
            begun = load_lora_drafter(start_from, tapped, dtype=torch.float32)
        else:
            begun = load_drafter(start_from, dtype=torch.float32, device=model.device)
            begun.check_target(tapped)
        trained.start_from(begun)
    parameters = sum(p.numel() for p in trained.parameters())
    shown.print(f"drafter: {parameters / 1e6:.1f} M parameters, {what}")
    options = dict(max_length=max_length, held_out=held_out, resume=resume, overwrite=overwrite, console=shown)
    if answers is not None:
        train_on_answers(trained, tapped, answers, output, recipe, features=features, **options)
    else:
        PartialState(cpu=model.device.type == "cpu")  # lets the processes of torchrun encode a part each
        encoded, asked = to_answer(
            tapped,
            tok,
            conversations,
            prompts,
            left_out,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            chat_template_args=chat_template_args,
            temperature=temperature,
            server=server,
            server_model=server_model,
        )
        train_on_prompts(trained, tapped, encoded, output, recipe, decode_batch=decode_batch, **asked, **options)
    shown.print(f"the drafter is in {output}")


def _check_kind(ctx: typer.Context, kind: str) -> None:
    """Raises a ValueError for an unknown kind of drafter, and for an option that only another kind has."""
    if kind not in OPTIONS_OF:
        raise ValueError(f"--drafter '{kind}' is not known: choose one of {', '.join(OPTIONS_OF)}")
    for other, names in OPTIONS_OF.items():
        if other != kind:
            refuse(ctx, names, f"is an option of --drafter {other}, not of {kind}")


def _target_of_canvases(denoiser: Denoiser) -> Target:
    """The model whose states a drafter of this denoiser's canvases reads.

    Raises:
        ValueError: the denoiser has a mask token, or it is gated.
    """
    if denoiser.mask_id is not None:
        raise ValueError("--denoiser has a mask token; only canvases of denoisers of uniform noise begin with drafts")
    if denoiser.encoder is not None:
        raise ValueError("--denoiser is gated: its base reads the context, and a drafter of the base serves both")
    return denoiser.target
