"""Answers from servers that take and return token ids, take them alone, or know text alone."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dflash_ext.data import AnswerDataset, DataError, Server, answer_prompts
from dflash_ext.data import server as server_module
from dflash_ext.decode import decode
from dflash_ext.models import Target
from python_tests.data.letters import letters
from python_tests.tiny import random_prompts, tiny_model

TOKENIZER = letters()
STOP = 2
PROMPTS = dict(enumerate(random_prompts(4, 6, 9, 5)))


@pytest.fixture(scope="module")
def target():
    return Target(tiny_model("llama"))


class Handler(BaseHTTPRequestHandler):
    """`server.kind` is "ids", "takes ids" or "text"; `server.faults` is the number of requests that fail first."""

    def log_message(self, *_):
        pass

    def reply(self, code: int, body: dict) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        known = {"model", "prompt", "max_tokens", "temperature", "seed"}
        known |= {"ids": {"stop_token_ids", "return_token_ids"}, "takes ids": {"stop_token_ids"}, "text": set()}[
            self.server.kind
        ]
        if self.server.faults:
            self.server.faults -= 1
            return self.reply(503, {"error": "busy"})
        if body.keys() - known or isinstance(body["prompt"], list) == (self.server.kind == "text"):
            return self.reply(422, {"detail": "unexpected"})
        prompt = body["prompt"] if isinstance(body["prompt"], list) else TOKENIZER(body["prompt"])["input_ids"]
        options = {"max_new_tokens": body["max_tokens"], "temperature": body["temperature"], "seed": [body["seed"]]}
        (done,) = decode(self.server.target, None, [prompt], stop_token_ids=STOP, **options).completions
        choice = {"text": TOKENIZER.decode(done.tokens, skip_special_tokens=True), "finish_reason": done.finish_reason}
        if self.server.kind == "ids":
            choice["token_ids"] = done.tokens
        self.reply(200, {"choices": [choice], "usage": {"completion_tokens": len(done.tokens)}})


@pytest.fixture
def serve(target):
    servers = []

    def start(kind: str, faults: int = 0):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.kind, server.faults, server.target, server.bodies = kind, faults, target, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rows_of(path):
    return sorted(map(json.loads, path.read_text().splitlines()[1:]), key=lambda row: row["index"])


@pytest.mark.parametrize("kind", ["ids", "takes ids", "text"])
def test_a_server_answers_as_the_target_does(target, serve, tmp_path, kind):
    _, url = serve(kind)
    options = dict(max_new_tokens=12, stop_token_ids=(STOP,), batch_size=2)
    answer_prompts(target, PROMPTS, tmp_path / "own.jsonl", **options)
    answer_prompts(target, PROMPTS, tmp_path / "served.jsonl", server=Server(f"{url}/v1/", TOKENIZER), **options)
    own, served = rows_of(tmp_path / "own.jsonl"), rows_of(tmp_path / "served.jsonl")
    same = [theirs for theirs in served if "no_round_trip" not in theirs]
    assert all(theirs == own[theirs["index"]] for theirs in same)
    # Text without the tokenizer's special tokens cannot stand for an answer that has one.
    plain = [row for row in own if not set(row["response_ids"]) & {0, 1} and STOP not in row["response_ids"][:-1]]
    assert [row["index"] for row in same] == [row["index"] for row in (own if kind == "ids" else plain)]
    dataset = AnswerDataset(tmp_path / "served.jsonl", 99, target=target)
    assert dataset.no_round_trip == len(own) - len(same)


def test_a_text_of_other_tokens_is_counted(target, serve, tmp_path, monkeypatch):
    _, url = serve("text")
    whole = type(TOKENIZER).decode
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda self, ids, **options: whole(self, ids, **options) + "!")
    answer_prompts(target, PROMPTS, tmp_path / "a.jsonl", max_new_tokens=8, server=Server(url, TOKENIZER))
    rows = rows_of(tmp_path / "a.jsonl")
    assert all(row["response_ids"] == [] and "a prompt of" in row["no_round_trip"] for row in rows)


def test_a_continued_file_asks_only_for_what_is_missing(target, serve, tmp_path):
    server, url = serve("ids")
    path, options = tmp_path / "a.jsonl", dict(max_new_tokens=8, temperatures=(0.0, 0.8))
    answer_prompts(target, PROMPTS, path, server=Server(url, TOKENIZER), **options)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:5]) + whole[5][:-9])
    asked = len(server.bodies)
    answer_prompts(target, PROMPTS, path, server=Server(url, TOKENIZER), **options)
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(whole)
    assert len(server.bodies) - asked == 4
    with pytest.raises(DataError, match="made with other server"):
        answer_prompts(target, PROMPTS, path, **options)


def test_a_server_that_is_busy_is_asked_again(target, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "PAUSE", 0.01)
    _, url = serve("ids", faults=2)
    assert Server(url, TOKENIZER).answer(PROMPTS[0], max_new_tokens=4)
    _, url = serve("ids", faults=100)
    with pytest.raises(DataError, match=r"the server refuses a completion \(503: .*busy"):
        Server(url, TOKENIZER).answer(PROMPTS[0], max_new_tokens=4)


def test_a_server_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr(server_module, "PAUSE", 0.01)
    with pytest.raises(DataError, match="http://127.0.0.1:9/v1/models: .*refused"):
        Server("http://127.0.0.1:9", TOKENIZER)
