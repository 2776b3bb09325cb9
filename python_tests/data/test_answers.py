import json

import pytest
import torch

from dflash_ext.data import Conversation, DataError, answer_prompts, encode, encode_all
from dflash_ext.decode import decode
from dflash_ext.models import Target
from python_tests.data.letters import letters
from python_tests.tiny import tiny_model

PROMPTS = ["what is it", "say something long, please", "a", "x" * 60, "count to ten"]
LEFT_OUT = 3  # longer than max_prompt_tokens


@pytest.fixture(scope="module")
def target():
    return Target(tiny_model("llama"))


def answer(target, path, **changes):
    conversations = [Conversation.user(text) for text in changes.pop("prompts", PROMPTS)]
    prompts = encode_all(conversations, letters(), max_prompt_tokens=changes.pop("max_prompt_tokens", 40))
    options = dict(max_new_tokens=12, temperatures=(0.0, 0.9), batch_size=2, stop_token_ids=(2,))
    answer_prompts(target, prompts, path, **options | changes)


def rows_of(path):
    header, *rows = map(json.loads, path.read_text().splitlines())
    return rows


def test_every_prompt_is_answered_by_the_target(target, tmp_path):
    path, done = tmp_path / "new" / "answers.jsonl", []
    answer(target, path, on_progress=done.append)
    assert sum(done) == 2 * (len(PROMPTS) - 1)
    rows = rows_of(path)
    asked = [i for i in range(len(PROMPTS)) if i != LEFT_OUT]
    assert sorted((row["index"], row["temperature"]) for row in rows) == [(i, t) for i in asked for t in (0.0, 0.9)]
    for row in rows:
        prompt = encode(Conversation.user(PROMPTS[row["index"]]), letters(), max_prompt_tokens=40)
        assert row["prompt_ids"] == prompt
        if row["temperature"] == 0:
            (completion,) = decode(target, None, [prompt], max_new_tokens=12, stop_token_ids=(2,)).completions
            assert row["response_ids"] == completion.tokens


def test_each_answer_is_on_disk_when_it_is_reported(target, tmp_path):
    path = tmp_path / "answers.jsonl"
    seen = []
    answer(target, path, max_prompt_tokens=99, on_progress=lambda _: seen.append(len(rows_of(path))))
    assert seen == list(range(1, 11))


@pytest.mark.parametrize("cut", ["header", "in a row", "after a row", "nothing"])
def test_an_interrupted_run_goes_on(target, tmp_path, cut):
    path = tmp_path / "answers.jsonl"
    answer(target, path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {
        "header": lines[0][:30],
        "in a row": b"".join(lines[:4]) + lines[4][:-7],
        "after a row": b"".join(lines[:4]),
        "nothing": whole,
    }[cut]
    path.write_bytes(kept)
    done = []
    answer(target, path, on_progress=done.append)
    assert sum(done) == 2 * (len(PROMPTS) - 1)
    after = path.read_bytes()
    assert after.startswith(kept[: kept.rfind(b"\n") + 1])
    # Sampled answers, too, are those of the run that was not interrupted.
    assert sorted(after.splitlines()) == sorted(whole.splitlines())


def test_a_temperature_given_twice_gives_two_different_samples(target, tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(target, path, temperatures=(5.0,))
    answer(target, path, temperatures=(5.0, 5.0))
    rows = rows_of(path)
    assert len(rows) == 8
    assert len({tuple(row["response_ids"]) for row in rows}) == 8


def test_two_greedy_answers_to_a_prompt_are_refused(target, tmp_path):
    with pytest.raises(ValueError, match="temperature 0 is given twice"):
        answer(target, tmp_path / "answers.jsonl", temperatures=(0.0, 0.9, 0.0))
    assert not (tmp_path / "answers.jsonl").exists()


def test_answers_to_something_else_are_refused_and_kept(target, tmp_path):
    path = tmp_path / "answers.jsonl"
    answer(target, path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="answers.jsonl: holds answers made with other weights"):
        answer(Target(tiny_model("llama", initializer_range=0.1)), path)
    with pytest.raises(DataError, match="made with other prompts"):
        answer(target, path, prompts=PROMPTS[1:])
    with pytest.raises(DataError, match=r"made with other max new tokens \(12, this run has 5\)"):
        answer(target, path, max_new_tokens=5)
    with pytest.raises(DataError, match="made with other chat template args"):
        answer(target, path, chat_template_args={"enable_thinking": False})
    with pytest.raises(DataError, match=r"made with other seed \(0, this run has 1\)"):
        answer(target, path, seed=1)
    with pytest.raises(DataError, match=r"made with other dtype \(float32, this run has bfloat16\)"):
        answer(Target(tiny_model("llama").to(torch.bfloat16)), path)
    with pytest.raises(DataError, match="holds more answers at temperature 0.0 than this run asks for"):
        answer(target, path, temperatures=(0.7,))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ['{"prompt": "mine"}\n', "no line end", "notes\n"])
def test_a_file_of_something_else_is_refused_and_kept(target, tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="mine.jsonl"):
        answer(target, path)
    assert path.read_text() == content


def test_a_refused_run_stands_in_nobodys_way(target, tmp_path):
    """What a run leaves that failed before its first answer does not hold up a run with other options."""
    path = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="do not fit"):
        answer(target, path, max_new_tokens=999)
    answer(target, path)
    assert len(rows_of(path)) == 8


def test_answers_to_chat_template_args_go_on_with_the_same(target, tmp_path):
    path, options = tmp_path / "answers.jsonl", {"chat_template_args": {"enable_thinking": False}}
    answer(target, path, **options)
    before = path.read_bytes()
    assert json.loads(before.splitlines()[0])["chat_template_args"] == {"enable_thinking": False}
    answer(target, path, **options)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="made with other chat template args"):
        answer(target, path)


def test_prompts_that_are_all_too_long():
    conversations = [Conversation.user(text) for text in PROMPTS]
    with pytest.raises(DataError, match="a prompt has 15 tokens, at most 3 are allowed: 'what is it'"):
        encode_all(conversations, letters(), max_prompt_tokens=3)


def test_processes_may_share_a_gpu(target, tmp_path, monkeypatch):
    """Accelerate's barrier names a GPU by the process's number, which may be above that of the GPUs."""

    def barrier(self):
        raise AssertionError("invalid device ordinal")

    monkeypatch.setattr("accelerate.PartialState.wait_for_everyone", barrier)
    answer_prompts(target, {0: [3, 4, 5]}, tmp_path / "answers.jsonl", max_new_tokens=4)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
