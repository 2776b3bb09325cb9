import shutil

import pytest
import torch
from safetensors.torch import load_file

from dflash_ext.data import AnswerDataset, DataError, FeatureDataset, answer_prompts, write_features
from dflash_ext.models import Target
from dflash_ext.train import Recipe, train_on_answers
from python_tests.tiny import random_prompts, tiny_model, tiny_pair


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A target, a drafter, the path of answers, their dataset, and a folder of features in several shards."""
    folder = tmp_path_factory.mktemp("features")
    target, drafter = tiny_pair("llama")
    answer_prompts(
        Target(target.model), dict(enumerate(random_prompts(*range(4, 12)))), folder / "a.jsonl", max_new_tokens=10
    )
    dataset = AnswerDataset(folder / "a.jsonl", 18, target=target)
    write_features(target, dataset, folder / "features", shard_tokens=40, batch_tokens=50)
    return target, drafter, folder / "a.jsonl", dataset, folder / "features"


def test_they_are_the_targets_own(made):
    target, _, _, dataset, folder = made
    assert len(list(folder.glob("*.safetensors"))) > 2
    for part in dataset.split(0.3):
        read = FeatureDataset(part, folder, target)
        assert len(read) == len(part)
        for i in range(len(part)):
            ids = part[i]["input_ids"]
            assert torch.equal(read[i]["input_ids"], ids)
            torch.testing.assert_close(read[i]["features"], target.features(ids[None])[0], rtol=1e-4, atol=1e-5)


def test_a_folder_that_was_begun_is_continued(made, tmp_path):
    target, _, _, dataset, folder = made
    shutil.copytree(folder, tmp_path / "begun")
    first, second, *others = sorted((tmp_path / "begun").glob("*.safetensors"))
    kept = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:100])
    for shard in others:
        shard.unlink()
    with pytest.raises(DataError, match="answers have no features; continue writing them"):
        FeatureDataset(dataset, tmp_path / "begun", target)
    done = []
    write_features(target, dataset, tmp_path / "begun", shard_tokens=40, batch_tokens=50, on_progress=done.append)
    assert sum(done) == len(dataset) and first.stat().st_mtime_ns == kept
    assert all(path.name in {p.name for p in folder.iterdir()} for path in (tmp_path / "begun").iterdir())
    for shard in folder.glob("*.safetensors"):
        ours, theirs = load_file(shard), load_file(tmp_path / "begun" / shard.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_features_of_something_else_are_refused(made, tmp_path):
    target, _, answers, dataset, folder = made
    for change, message in (
        (lambda: (dataset, Target(target.model, [t + 1 for t in target.tap_ids])), "features of other layers"),
        (lambda: (dataset, Target(tiny_model("llama", initializer_range=0.1), target.tap_ids)), "of other weights"),
        (lambda: (dataset, Target(tiny_model("llama").bfloat16(), target.tap_ids)), "of other dtype"),
        (lambda: (AnswerDataset(answers, 12), target), "of other answers"),
    ):
        part, other = change()
        with pytest.raises(DataError, match=message):
            FeatureDataset(part, folder, other)
        with pytest.raises(DataError, match=message):
            write_features(other, part, folder)
    with pytest.raises(DataError, match="no folder of features"):
        FeatureDataset(dataset, tmp_path, target)


@pytest.mark.parametrize("pack_length", [None, 40])
def test_training_on_them_is_training_with_the_target(made, tmp_path, pack_length, monkeypatch):
    target, _, answers, _, folder = made
    losses = []
    for features in (None, folder):
        _, drafter = tiny_pair("llama")
        recipe = Recipe(steps=3, batch_size=3, anchors=4, log_every=1, pack_length=pack_length)
        options = dict(max_length=18, held_out=0.2, features=features)
        with monkeypatch.context() as patch:
            if features:
                patch.setattr(Target, "features_and_hidden", None)  # the target's layers do not run
            log = train_on_answers(drafter, target, answers, tmp_path / str(features is None), recipe, **options)
        losses.append([entry.get("loss", entry.get("eval_loss")) for entry in log[:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
