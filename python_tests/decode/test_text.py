"""Text and stop strings, as they come token by token."""

import random

import pytest

from dflash_ext.decode import Engine, decode
from dflash_ext.decode.text import Text
from python_tests.tiny import random_prompts, tiny_pair


class Bytes:
    """A tokenizer of byte pieces: characters may be split among tokens, and token 0 is special."""

    all_special_tokens = ["<eos>"]
    pieces = ["", "a", "b", "ab", "ba", " a", "\n", "\n\n", "aab", *[bytes([x]) for x in "é€".encode()]]

    def decode(self, ids, skip_special_tokens=True):
        pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in (self.pieces[i] for i in ids)]
        return b"".join(pieces).decode("utf-8", errors="replace")


def random_tokens(chance: random.Random) -> list[int]:
    tokens = []
    for _ in range(chance.randint(0, 25)):
        tokens += [[9, 10], [11, 12, 13]][chance.randrange(2)] if chance.random() < 0.2 else [chance.randrange(9)]
    return tokens[: chance.randint(0, 25)]  # may end within a character


def expected_end(tokens: list[int], stops: list[str]) -> tuple[str, int] | None:
    """The text before the first stop string to be complete, and the number of tokens read until then."""
    for count in range(len(tokens) + 1):
        text = Bytes().decode(tokens[:count])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], count
    return None


@pytest.mark.parametrize("seed", range(20))
def test_text_ends_before_a_stop_string_however_tokens_arrive(seed):
    chance, cases = random.Random(seed), 0
    for _ in range(40):
        tokens = random_tokens(chance)
        stops = ["".join(chance.choices("ab \né€", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3))]
        end = expected_end(tokens, stops)
        made, streamed, left = Text(Bytes(), stops), [], list(tokens)
        while left and not made.stopped:
            part, left = left[:4], left[4:]
            taken = made.add(part)
            ended = made.stopped or not left
            if ended:
                made.finish()
                left = part[taken:]
            streamed.append(made.take(ended=ended))
            assert made.shown_text <= len(made.text)
        text, used = end if end else (Bytes().decode(tokens), len(tokens))
        shown = [token for part, _ in streamed for token in part]
        assert "".join(piece for _, piece in streamed) == made.text == text
        assert made.stopped == (end is not None) and len(made.tokens) == used
        assert shown == tokens[: len(shown)]
        if end is None:
            assert shown == tokens
        else:  # the next token would hold a piece of the stop string, or a character that is cut
            cases += 1
            assert text.startswith(Bytes().decode(tokens[: len(shown)]))
            assert not text.startswith(Bytes().decode(tokens[: len(shown) + 1]))
    assert cases


def test_a_stop_string_across_tokens_ends_a_row_in_the_middle_of_a_block():
    """The same with and without a drafter, and whatever is streamed is never taken back."""

    class Letters:
        def decode(self, ids, skip_special_tokens=True):
            return "".join("abcdefgh"[token % 8] + "ij"[token % 2] for token in ids)

    target, drafter = tiny_pair("llama")
    prompts = random_prompts(4, 9, 17, 5)
    options = dict(max_new_tokens=30, tokenizer=Letters())
    whole = decode(target, None, prompts, **options)
    assert [c.text for c in whole.completions] == [Letters().decode(c.tokens) for c in whole.completions]
    # A string from the middle of a token to the middle of the token after the next one.
    stop = whole.completions[0].text[21:24]
    cut = [(c.text.split(stop)[0], stop in c.text) for c in whole.completions]
    for draft in (None, drafter):
        streamed, tokens = [""] * 4, [[] for _ in prompts]

        def on_text(index, text, streamed=streamed):
            streamed[index] += text

        def on_tokens(index, new, tokens=tokens):
            tokens[index] += new

        callbacks = dict(on_text=on_text, on_tokens=on_tokens)
        decoded = decode(target, draft, prompts, stop_strings=[stop, "never"], **options, **callbacks)
        for index, completion in enumerate(decoded.completions):
            text, stopped = cut[index]
            assert completion.text == streamed[index] == text
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert completion.tokens == tokens[index] == whole.completions[index].tokens[: len(text) // 2]
    assert sum(stopped for _, stopped in cut) >= 1 and len(cut[0][0]) % 2


@pytest.mark.parametrize(
    "stops, message",
    [
        (dict(stop_strings="x"), "stop_strings need a tokenizer"),
        (dict(stop_strings=["x", ""], tokenizer=Bytes()), "an empty string"),
        (dict(stop_strings=[5], tokenizer=Bytes()), r"stop_strings is \[5\]"),
        (dict(stop_strings="a<eos>", tokenizer=Bytes()), "'a<eos>' has the special token '<eos>'"),
        (dict(stop_strings=5, tokenizer=Bytes()), r"stop_strings is 5 \(int\)"),
    ],
)
def test_refuses_stop_strings(stops, message):
    target, _ = tiny_pair("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        decode(target, None, [[5, 6]], max_new_tokens=4, **stops)
    engine = Engine(target, slots=1, max_length=20, tokenizer=stops.get("tokenizer"))
    with pytest.raises((ValueError, TypeError), match=message):
        engine.submit([5, 6], max_new_tokens=4, stop_strings=stops["stop_strings"])
