"""Lets the target answer prompts, because a drafter must learn what this target says and not what a corpus says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..decode import Completion, decode
from ..models import Target
from . import fingerprints
from .answer_file import answered_in, open_to_append, resume, write_answer
from .prompts import Conversation
from .server import NoRoundTrip, Server, answer_all


def answer_prompts(
    target: Target,
    prompts: Mapping[int, Sequence[int]],
    path: str | Path,
    *,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0,),
    batch_size: int = 32,
    seed: int = 0,
    stop_token_ids: Sequence[int] = (),
    chat_template_args: Mapping[str, Any] | None = None,
    conversations: Mapping[int, int] | None = None,
    server: Server | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Lets `target` answer every prompt once per entry of `temperatures`, and writes the answers to the JSONL `path`.

    Each answer is written as soon as it ends. An existing file is continued: its answers are kept, and a last line that
    was cut off is replaced. The random draws of an answer follow from the seed, its prompt's index, its temperature and
    which of the answers at this temperature it is, so that a continued file gets the answers of an uninterrupted one.
    The ranks of torchrun divide the prompts.

    Args:
        prompts: token ids by the index that the answers carry, as `encode_all` returns them.
        max_new_tokens: the largest number of tokens in an answer.
        temperatures: 0 is greedy, and may be given only once.
        batch_size: the number of prompts that are answered at a time, or that wait for the server.
        seed: the seed of sampled answers.
        stop_token_ids: tokens that end an answer.
        chat_template_args: the variables that the prompts were encoded with. They are kept in the file's header.
        conversations: the number of the conversation that a prompt belongs to, by its index (`conversation_numbers`). A
            dataset of answers keeps a conversation on one side of a split. By default each prompt is one of its own.
        server: a server of this target, which answers in its place. An answer whose text does not stand for the same
            tokens gets a row without tokens, in which "no_round_trip" says why.
        on_progress: called with the number of answers that have been added. Answers that are already in the file count,
            so that the numbers add up to `len(prompts) * len(temperatures)`.

    Raises:
        DataError: `path` holds something else, or answers of another target, to other prompts or with other settings.
        ValueError: temperature 0 is given twice.
    """
    progress = on_progress or (lambda _: None)
    path = Path(path)
    header = {
        "target": Path(target.model.config.name_or_path).name,
        "vocab_size": target.vocab_size,
        "weights": target.fingerprint,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": sorted(stop_token_ids),
        "chat_template_args": dict(chat_template_args) if chat_template_args else None,
        "server": server and server.model,
        "dtype": None if server else str(target.dtype).removeprefix("torch."),
        "seed": seed,
        "prompts": fingerprints.of_prompts(prompts),
    }
    wanted = {(index, *sample): None for sample in _numbered(temperatures) for index in prompts}  # in this order
    ranks = PartialState(cpu=target.device.type == "cpu")
    with _first(ranks.is_main_process):
        answered = resume(path, header, wanted) if ranks.is_main_process else answered_in(path)
    missing = [one for one in wanted if one not in answered]
    if answered:
        progress(len(wanted) - len(missing))
    left = len(missing)
    missing = missing[ranks.process_index :: ranks.num_processes]

    def write(position: int, tokens: list[int], **more: str) -> None:
        nonlocal left
        index, temperature, sample = missing[position]
        row = {"index": index, "temperature": temperature, "sample": sample}
        if conversations is not None:
            row["conversation"] = conversations[index]
        write_answer(file, row | {"prompt_ids": list(prompts[index]), "response_ids": tokens} | more)
        made = min(left, ranks.num_processes)  # the other ranks are about as fast
        left -= made
        progress(made)

    asked = [prompts[index] for index, _, _ in missing]
    sampling = {
        "temperature": [temperature for _, temperature, _ in missing],
        "seed": [fingerprints.seed_of(seed, *one) for one in missing],
    }
    limits = {"max_new_tokens": max_new_tokens, "stop_token_ids": tuple(stop_token_ids)}
    with open_to_append(path, header, ranks.process_index) as file:
        if server is not None:
            for position, answer in answer_all(server, asked, at_a_time=batch_size, **sampling, **limits):
                if isinstance(answer, NoRoundTrip):
                    write(position, [], no_round_trip=str(answer))
                else:
                    write(position, answer)
        elif asked:

            def finish(position: int, completion: Completion) -> None:
                write(position, completion.tokens)

            decode(target, None, asked, batch_size=batch_size, on_finish=finish, **sampling, **limits)
    _wait()
    with _first(ranks.is_main_process):
        if ranks.is_main_process:
            resume(path, header, wanted)


@contextmanager
def _first(is_main: bool) -> Iterator[None]:
    """The main process runs the block first, and the others after it."""
    if not is_main:
        _wait()
    yield
    if is_main:
        _wait()


def _wait() -> None:
    """Waits for all processes. Accelerate's barrier would need a GPU for each of them."""
    gather_object([None])


def conversation_numbers(conversations: Sequence[Conversation]) -> dict[int, int]:
    """The number of the conversation that each prompt belongs to, by its index as in `encode_all`."""
    rows = [conversation.row for conversation in conversations]
    alone = count(max((row for row in rows if row is not None), default=-1) + 1)
    return {index: next(alone) if row is None else row for index, row in enumerate(rows)}


def _numbered(temperatures: Sequence[float]) -> list[tuple[float, int]]:
    """Each temperature with the number of times that it came before."""
    seen = Counter()
    numbered = []
    for temperature in temperatures:
        if temperature == 0 and seen[0]:
            raise ValueError("temperature 0 is given twice: two greedy answers to a prompt are the same")
        numbered.append((temperature, seen[temperature]))
        seen[temperature] += 1
    return numbered
