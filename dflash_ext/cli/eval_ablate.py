"""`dflash-ext eval ablate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import console
from .eval_reconstruct import ModelName
from .loading import load_target
from .options import Device, Dtype, FiguresAndAnswersFile, Plot, Seed, Tokenizer
from .output import check_outputs, replacing

if TYPE_CHECKING:
    from ..decode.canvas import MaskedDiffusion
    from ..eval.ablation import AblationPrompt


def ablate(
    model: ModelName,
    denoiser: Annotated[Path, typer.Option(metavar="<path>", help="A folder of `dflash-ext adapt`.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A JSONL file of prompts, each an object with 'kind' and 'prompt', and for a gap to fill in with a "
            "'suffix'. The default is one prompt each of the kinds narrative, code, infill and question."
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<name>=<JSON>",
            help="A sampler of your own by the settings of MaskedDiffusion, such as "
            """'slow={"steps": 64}', or the name of a built-in one. The default is all built-in ones.""",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 4,
    canvas_length: Annotated[int, typer.Option(min=1, help="Tokens of a canvas.")] = 96,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The largest number of tokens in an answer.")] = 96,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that are decoded at a time.")] = 16,
    output: FiguresAndAnswersFile = None,
    plot: Plot = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="<path>", help="Write an answer of each variant to this Markdown file.")
    ] = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode prompts with one denoiser under several samplers, and report what they write.

    The base, which decodes token by token, is shown beside them and judges all answers.
    """
    from ..eval import ablation
    from ..eval.plot import check_plot
    from ..models import Target, load_denoiser

    check_outputs({"--output": output, "--plot": plot, "--answers": answers}, read=[prompts])
    if plot:
        check_plot(plot)
    asked = ablation.PROMPTS if prompts is None else read_prompts(prompts)
    chosen = _variants(variant) if variant else ablation.VARIANTS
    loaded, tok = load_target(model, tokenizer, dtype, device)
    base = Target(loaded)
    with console.status("decoding") as status:
        found = ablation.ablate(
            load_denoiser(loaded, denoiser),
            base,
            tok,
            asked,
            chosen,
            canvas_length=canvas_length,
            max_new_tokens=max_new_tokens,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            on_progress=lambda name: status.update(f"decoding: {name}"),
        )
    console.print(ablation.table(found, seed))
    if output:
        told = ablation.figures(found, seed)
        for name, each in found.items():
            told[name]["answers"] = [{"kind": one.prompt.kind, "text": one.text} for one in each]
        with replacing(output) as file:
            file.write(json.dumps(told, indent=1) + "\n")
        console.print(f"the figures are in {output}")
    if answers:
        with replacing(answers) as file:
            file.write(ablation.shown_samples(found))
        console.print(f"answers are in {answers}")
    if plot:
        ablation.plot_ablation(found, plot, seed)
        console.print(f"the plot is in {plot}")


def read_prompts(path: Path) -> list[AblationPrompt]:
    """The prompts of a JSONL file.

    Raises DataError, which names the line, for one that is no prompt, and for a file without any.
    """
    from ..data.errors import DataError
    from ..data.parsing import excerpt, json_value, require_file, utf8_text
    from ..eval.ablation import AblationPrompt

    require_file(path)
    found = []
    for number, line in enumerate(utf8_text(path.read_bytes(), str(path)).split("\n"), 1):
        if not line.strip():
            continue
        row = json_value(line, f"{path}, line {number}")
        has_texts = isinstance(row, dict) and all(isinstance(text, str) for text in row.values())
        if not has_texts or not {"kind", "prompt"} <= set(row) <= {"kind", "prompt", "suffix"}:
            raise DataError(
                f"{path}, line {number}: the texts 'kind', 'prompt' and perhaps 'suffix' are expected: {excerpt(row)}"
            )
        found.append(AblationPrompt(**row))
    if not found:
        raise DataError(f"{path}: there is no prompt in it")
    return found


def _variants(texts: list[str]) -> dict[str, MaskedDiffusion]:
    from ..eval.ablation import BASE

    found = {}
    for text in texts:
        name, process = _variant(text)
        if not name or name in found or name == BASE:
            raise ValueError(f"--variant {text}: a name of its own is needed before the =")
        found[name] = process
    return found


def _variant(text: str) -> tuple[str, MaskedDiffusion]:
    """The name and the sampler of a `--variant`."""
    from ..decode.canvas import MaskedDiffusion, process_of
    from ..eval.ablation import VARIANTS

    name, has_settings, settings = text.partition("=")
    if not has_settings:
        if name not in VARIANTS:
            raise ValueError(f"there is no variant '{name}': {', '.join(VARIANTS)} are built in")
        return name, VARIANTS[name]
    try:
        return name, process_of(MaskedDiffusion, json.loads(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--variant {name}: {error}") from None
