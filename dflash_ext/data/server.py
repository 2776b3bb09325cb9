"""Answers of a target that an OpenAI-compatible server runs: vLLM, SGLang, `transformers serve` and others."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .parsing import excerpt

ATTEMPTS = 4  # of a request that gets no answer; the pauses between them double
PAUSE = 1.0  # seconds


class NoRoundTrip(DataError):
    """A prompt or an answer whose text does not stand for the same tokens."""


class Server:
    """The completions endpoint of a server, `URL/v1/completions`.

    Prompts are sent as token ids, or as text to a server that takes no ids. Answers are the token ids that the server
    returns (vLLM's `return_token_ids`). From other servers they are the text, encoded again.

    Args:
        url: such as http://localhost:8000, with or without /v1.
        tokenizer: the target's.
        model: the name under which the server has the target; the first of its models by default.
        timeout: seconds that a request may take.

    Raises:
        DataError: the server cannot be reached or has no model.
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, *, model: str | None = None, timeout: float = 600):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.tokenizer, self.timeout = tokenizer, timeout
        if model is None:
            models = self._call("models").get("data") or []
            if not models:
                raise DataError(f"{self.url}: the server has no model")
            model = models[0]["id"]
        self.model = model
        self._form: Callable[[list[int], Sequence[int]], dict] | None = None  # that of the first request that it took

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop_token_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> list[int]:
        """The tokens of the answer to a prompt of token ids, the stop token included if one ended it.

        Raises:
            NoRoundTrip: the text of the prompt, or that of the answer, does not stand for the same tokens.
            DataError: the server refuses the request, cannot be reached, or answers something else than a completion.
        """
        settings = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature}
        settings["seed"] = seed % 2**31
        given = self._complete(list(prompt), stop_token_ids, settings)
        try:
            choice = given["choices"][0]
            ids, text, reason = choice.get("token_ids"), choice["text"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise DataError(f"{self.url}: no completion: {excerpt(given)}") from None
        if ids is not None:
            return ids
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if reason == "stop" and stop_token_ids and not set(ids[-1:]) & set(stop_token_ids):
            ends = self.tokenizer.eos_token_id
            ids.append(ends if ends in stop_token_ids else stop_token_ids[0])
        count = (given.get("usage") or {}).get("completion_tokens", len(ids))
        if count != len(ids) or len(ids) > max_new_tokens:
            raise NoRoundTrip(f"an answer of {count} tokens has a text of {len(ids)}: {excerpt(text)}")
        return ids

    def _complete(self, prompt: list[int], stops: Sequence[int], settings: dict) -> dict:
        forms = [self._form] if self._form else [self._ids_for_ids, self._text_for_ids, self._text_for_text]
        refused = None
        for form in forms:
            try:
                given = self._call("completions", settings | form(prompt, stops))
            except urllib.error.HTTPError as error:
                refused = refused or f"{error.code}: {excerpt(error.read().decode(errors='replace'))}"
                continue
            self._form = form
            return given
        raise DataError(f"{self.url}: the server refuses a completion ({refused})")

    def _ids_for_ids(self, prompt: list[int], stops: Sequence[int]) -> dict:
        return {"prompt": prompt, "stop_token_ids": list(stops), "return_token_ids": True}

    def _text_for_ids(self, prompt: list[int], stops: Sequence[int]) -> dict:
        return {"prompt": prompt, "stop_token_ids": list(stops)}

    def _text_for_text(self, prompt: list[int], stops: Sequence[int]) -> dict:
        text = self.tokenizer.decode(prompt)
        if self.tokenizer(text)["input_ids"] != prompt:
            # The server would put the first token before the text once more.
            text = self.tokenizer.decode(prompt[1:])
        if self.tokenizer(text)["input_ids"] != prompt:
            raise NoRoundTrip(f"a prompt of {len(prompt)} tokens has a text of other tokens: {excerpt(text)}")
        return {"prompt": text}

    def _call(self, path: str, body: dict | None = None) -> dict[str, Any]:
        """Raises HTTPError if the server refuses, and DataError if it cannot be reached or answers no JSON."""
        url = f"{self.url}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code < 500 or attempt == ATTEMPTS:
                    raise
            except (OSError, ValueError) as error:
                if attempt == ATTEMPTS or isinstance(error, ValueError):
                    raise DataError(f"{url}: {getattr(error, 'reason', error)}") from None
            time.sleep(PAUSE * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def answer_all(
    server: Server,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: Sequence[float],
    seed: Sequence[int],
    at_a_time: int,
    **limits: Any,
) -> Iterator[tuple[int, list[int] | NoRoundTrip]]:
    """The answers of `server`, each with its prompt's position, as they come.

    Args:
        temperature, seed: one for each prompt.
        at_a_time: the number of requests that wait for the server at a time.
        limits: the other options of `Server.answer`, for all prompts.
    """

    def ask(position: int) -> list[int] | NoRoundTrip:
        try:
            options = {"temperature": temperature[position], "seed": seed[position]}
            return server.answer(prompts[position], **options, **limits)
        except NoRoundTrip as problem:
            return problem

    with ThreadPoolExecutor(at_a_time) as pool:
        asked = {pool.submit(ask, position): position for position in range(len(prompts))}
        try:
            for done in as_completed(asked):
                yield asked[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)
