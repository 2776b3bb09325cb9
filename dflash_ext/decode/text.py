"""The text of a row's tokens as they come, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence

HALF = "\ufffd"  # what a tokenizer puts in the place of a character whose bytes are not complete


class Text:
    """Decodes the tokens of one row as they are committed.

    A stop string ends the row where it is complete, and is no part of the text. A token may carry the end of the text
    and the beginning of the stop string. Such a token is no part of the row's tokens, so that these may hold less than
    the text. Text that a stop string may begin with is held back until the next tokens decide.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens=True)`, as the tokenizers of transformers do.
    """

    def __init__(self, tokenizer, stop_strings: Sequence[str] = ()):
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self.ends: list[int] = []  # for each token whose characters are complete, where they end in the text
        self.begin = self.read = 0  # the tokens of the last piece of text, by which spaces before the next are known
        self.shown_tokens = self.shown_text = 0

    def add(self, tokens: Sequence[int]) -> int:
        """Takes tokens up to the first one that completes a stop string, and returns how many."""
        if not self.stop_strings:
            self.tokens += tokens
            self._decode()
            return len(tokens)
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            before = len(self.text)
            self._decode()
            if self._stop_at(before):
                return count
        return len(tokens)

    def finish(self) -> None:
        """Adds what the last tokens say, though they may end with half a character."""
        if not self.stopped:
            self._decode(ended=True)

    def take(self, *, ended: bool) -> tuple[list[int], str]:
        """The tokens and the text that are certain by now and were not taken before. If the row has ended, all are."""
        sure = len(self.text) if ended else self._held_from()
        tokens = self.shown_tokens
        while tokens < len(self.ends) and self.ends[tokens] <= sure:
            tokens += 1
        if ended and not self.stopped:
            tokens = len(self.tokens)
        new = self.tokens[self.shown_tokens : tokens], self.text[self.shown_text : sure]
        self.shown_tokens, self.shown_text = tokens, sure
        return new

    def _decode(self, *, ended: bool = False) -> None:
        """Adds to the text what the tokens that were not read yet say, if they end with a whole character."""
        known = self._text_of(self.tokens[self.begin : self.read])
        whole = self._text_of(self.tokens[self.begin :])
        if whole.endswith(HALF) and not ended:
            return
        if piece := whole[len(known) :]:
            self.begin = self.read
        self.read = len(self.tokens)
        self.text += piece
        self.ends += [len(self.text)] * (self.read - len(self.ends))

    def _text_of(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _stop_at(self, before: int) -> bool:
        """Cuts the text at the first stop string that ends beyond `before`, if there is one."""
        places = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop_strings]
        found = [place for place in places if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def _held_from(self) -> int:
        """The length of the text without an end that a stop string may begin with."""
        longest = max(map(len, self.stop_strings), default=1)
        for place in range(max(0, len(self.text) - longest + 1), len(self.text)):
            if any(stop.startswith(self.text[place:]) for stop in self.stop_strings):
                return place
        return len(self.text)
