"""Answers from `transformers serve`, which needs the packages of transformers' extra `serving`."""

import json
import socket
import subprocess
import sys
import time

import pytest

from dflash_ext.data import DataError, Server, answer_prompts
from dflash_ext.data import server as server_module
from dflash_ext.models import Target, load_target
from python_tests.data.letters import letters
from python_tests.tiny import random_prompts, tiny_model

for package in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(package)


@pytest.fixture
def url(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    letters().save_pretrained(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", tmp_path / "tiny", "--device", "cpu"]
    process = subprocess.Popen([*map(str, command), "--host", "127.0.0.1", "--port", str(port)])
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_it_answers_as_the_target_does(url, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "ATTEMPTS", 1)
    model, tokenizer = load_target(tmp_path / "tiny")
    server = None
    until = time.monotonic() + 120
    while server is None:
        try:
            server = Server(url, tokenizer)
        except DataError:
            assert time.monotonic() < until
            time.sleep(0.5)
    prompts = dict(enumerate(random_prompts(4, 6, 9, 5)))
    rows = {}
    for name, who in (("own", None), ("served", server)):
        path = tmp_path / f"{name}.jsonl"
        answer_prompts(Target(model), prompts, path, max_new_tokens=12, stop_token_ids=(2,), server=who)
        rows[name] = {row["index"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}
    same = [row for row in rows["served"].values() if "no_round_trip" not in row]
    assert len(same) >= 3  # one answer has a token without text
    assert all(row == rows["own"][row["index"]] for row in same)
