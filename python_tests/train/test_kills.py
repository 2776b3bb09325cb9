"""A run that is killed at any instant goes on from what is in its folder."""

import multiprocessing
import os
import random
import signal
import threading
import time

import torch
from safetensors.torch import load_file

from dflash_ext.train import Recipe, train_on_prompts
from python_tests.tiny import random_prompts, tiny_pair

RECIPE = Recipe(steps=6, batch_size=2, anchors=4, save_every=1, log_every=1, evaluate_every=2, evaluate_prompts=2)


def run(folder, kill_after=None) -> None:
    """A run from prompts to the drafter, which kills its own process after some seconds."""
    torch.set_num_threads(1)
    target, drafter = tiny_pair("llama")
    prompts = dict(enumerate(random_prompts(*range(4, 16))))
    if kill_after is not None:
        threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    train_on_prompts(drafter, target, prompts, folder, RECIPE, max_new_tokens=10, held_out=0.2, resume=True)
    os._exit(0)  # the timer too has ended


def started(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join()
    return process


def test_a_killed_run_equals_the_one_that_was_not(tmp_path):
    began = time.monotonic()
    assert started(tmp_path / "whole").exitcode == 0
    seconds = time.monotonic() - began
    draws, kills = random.Random(0), 0
    for _ in range(4):
        kills += started(tmp_path / "killed", draws.uniform(0.1, 0.5) * seconds).exitcode == -signal.SIGKILL
    assert started(tmp_path / "killed").exitcode == 0
    assert kills
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    answers = [sorted((tmp_path / name / "answers.jsonl").read_text().splitlines()) for name in ("whole", "killed")]
    assert answers[0] == answers[1]
    assert not list((tmp_path / "killed").glob(".*"))
