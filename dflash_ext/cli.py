"""The command line. Each command reads its input, calls the library and prints; what is wrong is said in one line."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="dflash-ext",
    help="Block-diffusion drafters and lossless speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

TargetName = Annotated[str, typer.Option(help="Folder or hub name of a causal LM; 'smollm2' is the packaged one.")]
Drafter = Annotated[Path | None, typer.Option(help="Folder of a DFlash drafter.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Prompts or conversations as JSONL, a JSON array or plain text; of 'turns' the first is asked."),
]
Field = Annotated[str | None, typer.Option(help="The key that holds the prompt, where it is none of the usual ones.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU is used where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU) or float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything that is drawn at random.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
BlockSize = Annotated[int | None, typer.Option(help="Slots of a block, at most the drafter's own, the default.")]
RowsAtATime = Annotated[int, typer.Option(min=1, help="Prompts decoded at a time.")]
Tokenizer = Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the target.")]


def command(function: Callable) -> Callable:
    """Registers a command; what is wrong with its input becomes one line on standard error and exit code 1."""

    @app.command()
    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            errors.print(f"dflash-ext: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            errors.print("dflash-ext: interrupted; what was computed is kept", style="red")
            raise typer.Exit(130) from None

    return run


@command
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the part that trains a tiny model, under two minutes.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts the real model answers.")] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of its answers.")] = 128,
) -> None:
    """Trains and decodes on the spot, then decodes with a real model and a real drafter."""
    from .demo import real_model, tiny_model

    _no_bars_for_weights()
    tiny_model(console)
    if not quick:
        real_model(console, count=prompts, max_new_tokens=max_new_tokens)


@command
def train(
    output: Annotated[Path, typer.Option(help="Folder for the drafter, its log and the answers.")],
    target: TargetName,
    prompts: Prompts = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers of an earlier run to train on, instead of prompts.")
    ] = None,
    field: Field = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are left out.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of the target's answers.")] = 256,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of the answers, greedy by default; repeat for several each.")
    ] = None,
    decode_batch: Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")] = 32,
    mask_token: Annotated[
        str | None, typer.Option(help="The mask token, by text or id, if the tokenizer has none.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the drafter.")] = 5,
    taps: Annotated[str, typer.Option(help="How many layers of the target to tap, or their ids: 1,9,17.")] = "5",
    block_size: Annotated[int, typer.Option(help="Slots of a block, the anchor included.")] = 16,
    intermediate_size: Annotated[int | None, typer.Option(min=1, help="Width of its MLPs; the target's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks drawn from each sequence.")] = 64,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens of a training sequence.")] = 1024,
    learning_rate: Annotated[float, typer.Option(min=0, help="Its peak; a cosine decay follows.")] = 6e-4,
    gamma: Annotated[
        float | None, typer.Option(help="Decay of the position weights; D-PACE weights if not given.")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of the prompts kept for evaluation.")] = 0.02,
    compile: Annotated[bool, typer.Option("--compile", help="Train under torch.compile.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint, if it has one.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 for none.")] = 0,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Trains a drafter for a target on the target's own answers to your prompts."""
    from .data import ResponseDataset, read_conversations
    from .data.parsing import require_file
    from .models import DFlashDrafter, Target
    from .train import Recipe, plot_curve, summary, train_drafter

    if (prompts is None) == (answers is None):
        raise ValueError("train needs either --prompts, which the target answers first, or --answers")
    # Whatever can be wrong without the target is found before it is loaded.
    if answers is None:
        conversations = read_conversations(prompts, field=field, limit=limit)
    else:
        require_file(answers)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: a folder is expected, this is a file")
    tap_choice = [_integer(t, "--taps") for t in taps.split(",")] if "," in taps else _integer(taps, "--taps")
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        anchors=anchors,
        learning_rate=learning_rate,
        gamma=gamma,
        seed=seed,
        save_every=save_every,
        compile=compile,
    )
    model, tok = _load_target(target, tokenizer, dtype, device)
    plain = Target(model)
    drafter = DFlashDrafter.for_target(
        plain,
        mask_token_id=_mask_token(tok, mask_token),
        num_layers=layers,
        block_size=block_size,
        taps=tap_choice,
        intermediate_size=intermediate_size,
    ).to(plain.device)
    parameters = sum(p.numel() for p in drafter.parameters())
    console.print(
        f"drafter: {layers} layers, {parameters / 1e6:.1f} M parameters, taps {drafter.config.target_layer_ids}"
    )

    output.mkdir(parents=True, exist_ok=True)
    if answers is None:
        answers = output / "answers.jsonl"
        _regenerate(
            plain,
            model,
            tok,
            conversations,
            answers,
            max_prompt_tokens,
            max_new_tokens,
            temperature,
            decode_batch,
            seed,
        )
    dataset = ResponseDataset(answers, max_length, vocab_size=plain.vocab_size)
    trained, kept_out = dataset.split(held_out, seed)
    console.print(f"answers: {len(trained)} to train on, {len(kept_out)} held out")
    tapped = Target(model, drafter.config.target_layer_ids)
    log = train_drafter(drafter, tapped, trained, output, recipe, held_out=kept_out, resume=resume, console=console)
    plot_curve(log, output / "curve.png")
    console.print(summary(log))
    console.print(f"the drafter is in {output}")


def _regenerate(
    target, model, tok, conversations, path, max_prompt_tokens, max_new_tokens, temperature, decode_batch, seed
) -> None:
    from .data import regenerate
    from .models import stop_tokens
    from .progress import progress

    temperatures = tuple(temperature or (0.0,))
    with progress(console, "the target answers", len(conversations) * len(temperatures)) as advance:
        dropped = regenerate(
            target,
            tok,
            conversations,
            path,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperatures=temperatures,
            batch_size=decode_batch,
            seed=seed,
            stop_token_ids=stop_tokens(tok, model),
            on_progress=advance,
        )
    if dropped:
        console.print(f"{dropped} prompts longer than {max_prompt_tokens} tokens were left out (--max-prompt-tokens)")


@command
def generate(
    target: TargetName,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; or give a file with --prompts.")] = None,
    drafter: Drafter = None,
    prompts: Prompts = None,
    field: Field = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="A longer prompt is an error.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer that nothing stops before.")] = 256,
    temperature: Temperature = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the most probable tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of the mass only.")] = None,
    block_size: BlockSize = None,
    batch_size: RowsAtATime = 8,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Write the answers to this JSONL.")] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decodes prompts: speculatively with a drafter, plainly without one."""
    from .data import Conversation, encode, read_conversations
    from .decode import decode
    from .eval import table
    from .models import stop_tokens

    if bool(prompt) == (prompts is not None):
        raise ValueError("generate needs prompts: as arguments, or a file with --prompts")
    conversations = (
        [Conversation.user(text) for text in prompt]
        if prompt
        else read_conversations(prompts, field=field, limit=limit)
    )
    _check_output(output)
    model, tok = _load_target(target, tokenizer, dtype, device)
    tapped, draft = _pair(model, drafter)
    encoded = [encode(c, tok, max_prompt_tokens=max_prompt_tokens) for c in conversations]
    streaming = len(encoded) == 1
    written = output.open("w") if output else None

    answer: list[int] = []

    def stream(_index: int, tokens: list[int]) -> None:
        if not streaming:
            return
        # A token may be half a character, or lose its space when decoded alone: print what the whole gained.
        shown = tok.decode(answer, skip_special_tokens=True).rstrip("\ufffd")
        answer.extend(tokens)
        sys.stdout.write(tok.decode(answer, skip_special_tokens=True).rstrip("\ufffd")[len(shown) :])
        sys.stdout.flush()

    def finish(index: int, completion) -> None:
        text = tok.decode(completion.tokens, skip_special_tokens=True)
        if written:
            row = {"index": index, "text": text, "finish_reason": completion.finish_reason, "tau": completion.tau}
            written.write(json.dumps(row) + "\n")
            written.flush()
        elif not streaming:
            console.rule(f"prompt {index + 1}")
            console.print(text, markup=False, highlight=False)

    decoded = decode(
        tapped,
        draft,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=stop_tokens(tok, model),
        block_size=block_size,
        batch_size=batch_size,
        seed=seed,
        on_tokens=stream,
        on_finish=finish,
    )
    if streaming:
        print()
    errors.print(table({"all prompts": decoded}))  # what is piped is the answer alone


@command
def evaluate(
    target: TargetName,
    drafter: Drafter,
    prompts: Annotated[list[Path], typer.Option(help="A prompt set, a file as for train; repeat for several.")],
    field: Field = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first prompts of each set.")] = 80,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer that nothing stops before.")] = 256,
    temperature: Temperature = 0.0,
    block_size: BlockSize = None,
    batch_size: RowsAtATime = 8,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON.")] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measures tau and acceptance by position on prompt sets, by real decoding."""
    from .data import encode, read_conversations
    from .decode import decode
    from .eval import figures, table
    from .models import stop_tokens
    from .progress import progress

    if len(names := [path.stem for path in prompts]) > len(set(names)):
        raise ValueError(f"prompt sets are named by their files, and two of {', '.join(names)} have one name")
    sets = {path.stem: read_conversations(path, field=field, limit=limit) for path in prompts}
    _check_output(output)
    model, tok = _load_target(target, tokenizer, dtype, device)
    tapped, draft = _pair(model, drafter)
    results = {}
    for name, conversations in sets.items():
        encoded = [encode(c, tok, max_prompt_tokens=2048) for c in conversations]
        with progress(console, name, len(encoded)) as advance:
            results[name] = decode(
                tapped,
                draft,
                encoded,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_token_ids=stop_tokens(tok, model),
                block_size=block_size,
                batch_size=batch_size,
                seed=seed,
                on_finish=lambda *_: advance(1),
            )
    console.print(table(results))
    if output:
        output.write_text(json.dumps({name: figures(decoded) for name, decoded in results.items()}, indent=1) + "\n")
        console.print(f"the figures are in {output}")


@command
def doctor() -> None:
    """Says what is built, on what it runs, and what serves each operator."""
    from .doctor import report

    report(console)


def _check_output(path: Path | None) -> None:
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--output {path}: a file in a folder that exists is expected")


def _integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} is '{text}': a number is expected") from None


def _no_bars_for_weights() -> None:
    """Reading and writing them takes moments."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _load_target(name: str, tokenizer: str | None, dtype: str | None, device: str | None):
    import torch

    from .models import load_target

    _no_bars_for_weights()
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"dtype '{dtype}' is not supported; choose one of {', '.join(kinds)}")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device '{device}' is not supported; choose cpu or cuda")
    where = torch.device(device) if device else None
    if where is not None and where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"there is no CUDA device for --device {device} here ({found} found): leave it out")
    return load_target(name, tokenizer=tokenizer, dtype=kinds.get(dtype), device=where)


def _pair(model, path: Path | None):
    """The target, tapped for the drafter in `path` if there is one, and that drafter."""
    from .models import Target, load_drafter

    if path is None:
        return Target(model), None
    drafter = load_drafter(path, dtype=model.dtype, device=model.device)
    return Target(model, drafter.config.target_layer_ids), drafter


def _mask_token(tokenizer, given: str | None) -> int:
    """The id of the mask token: as given by text or id, or the tokenizer's own."""
    if given is None:
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token: name a spare one, by text or id, with --mask-token")
        return tokenizer.mask_token_id
    if given.isascii() and given.isdigit():
        return int(given)
    token = tokenizer.convert_tokens_to_ids(given)
    if token is None or token == tokenizer.unk_token_id:
        raise ValueError(f"mask token '{given}' is not in the tokenizer's vocabulary")
    return token


def main() -> None:
    app()


if __name__ == "__main__":
    main()
