"""Drafters from folders and the hub, with and without tables of their own, and what is written of them."""

import json
import warnings

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_ext.models import DFlashDrafter, load_drafter, save_drafter
from python_tests.tiny import VOCAB, tiny_pair

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def load(folder) -> DFlashDrafter:
    return load_drafter(folder, dtype=torch.float32, device=CPU)


def rewrite(folder, change) -> None:
    """Applies `change` to the tensors of the one file of weights."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def own_tables(drafted: torch.Tensor | None = None, *, d2t: bool = True, t2d: bool = True) -> dict[str, torch.Tensor]:
    """An embedding and a head of a drafter's own, the head with rows for `drafted` alone if they are given."""
    generator = torch.Generator().manual_seed(5)
    rows = VOCAB if drafted is None else len(drafted)
    tables = {"embed_tokens.weight": torch.randn(VOCAB, 64, generator=generator)}
    tables["lm_head.weight"] = torch.randn(rows, 64, generator=generator)
    if drafted is not None and d2t:
        tables["d2t"] = drafted - torch.arange(rows)
    if drafted is not None and t2d:
        tables["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, drafted, True)
    return tables


@pytest.fixture
def folder(tmp_path):
    save_drafter(tiny_pair("llama")[1], tmp_path)
    return tmp_path


def test_one_file_by_default_and_shards_on_request(folder):
    _, drafter = tiny_pair("llama")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.warns(UserWarning, match="speculators' converter does not read several files"):
        save_drafter(drafter, folder, max_shard_size="100KB")
    assert (folder / INDEX).exists() and not (folder / "model.safetensors").exists()
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[name])
    with torch.no_grad():
        drafter.fc.weight.zero_()
    save_drafter(drafter, folder)  # nothing of the shards is left to be read instead
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert not load(folder).fc.weight.any()


def test_a_drafter_that_everybody_reads_is_saved_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_drafter(tiny_pair("qwen3")[1], tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sample_from_anchor": True}, "does not read sample_from_anchor"),
        ({"window_convention": "speculators", "layer_types": ["sliding_attention"] * 2}, "a window of its own"),
        ({"noise": "uniform"}, "instead of random tokens"),
        ({"dflash_config": {"output_multiplier": 0.5}}, "vLLM's and SGLang's DFlash do not read output_multiplier"),
    ],
)
def test_what_others_do_not_read_is_said_when_it_is_saved(tmp_path, change, sentence):
    _, drafter = tiny_pair("llama")
    for key, value in change.items():
        setattr(drafter.config, key, {**drafter.config.dflash_config, **value} if isinstance(value, dict) else value)
    with pytest.warns(UserWarning, match=sentence):
        save_drafter(drafter, tmp_path)


def test_names_may_begin_with_model(folder):
    expected = load(folder).state_dict()
    rewrite(folder, lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()})
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_tensor_that_stands_there_twice_is_refused(folder):
    rewrite(folder, lambda tensors: tensors | {"model.fc.weight": tensors["fc.weight"] + 1})
    with pytest.raises(ValueError, match="there are two tensors for fc.weight"):
        load(folder)


@torch.no_grad()
def test_tables_of_its_own_are_used_and_written(folder, tmp_path):
    target, _ = tiny_pair("llama")
    tables = own_tables()
    rewrite(folder, lambda tensors: tensors | tables)
    drafter = load(folder)
    hidden, tokens = torch.randn(2, 3, 64), torch.tensor([[4, 96]])
    assert torch.equal(drafter.embed(target, tokens), tables["embed_tokens.weight"][tokens])
    torch.testing.assert_close(drafter.logits(target, hidden), hidden @ tables["lm_head.weight"].T)
    assert not {"embed_tokens.weight", "lm_head.weight"} & dict(drafter.named_parameters()).keys()
    assert load_drafter(folder, dtype=torch.bfloat16, device=CPU).lm_head.weight.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="uses the target's embedding and head"):
        save_drafter(drafter, tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again.logits(target, hidden), drafter.logits(target, hidden))
    # transformers' own way of reading finds them as well, by the config that was written.
    other = DFlashDrafter.from_pretrained(tmp_path / "again")
    assert torch.equal(other.logits(target, hidden), drafter.logits(target, hidden))


@pytest.mark.parametrize("maps", [{"d2t": True, "t2d": True}, {"t2d": False}, {"d2t": False}])
@pytest.mark.parametrize("own_head", [True, False])
@torch.no_grad()
def test_a_reduced_vocabulary_gives_logits_over_the_targets(folder, maps, own_head):
    target, _ = tiny_pair("llama")
    drafted = torch.tensor([0, 3, 4, 17, 50, 51, 96])
    tables = own_tables(drafted, **maps)
    if not own_head:
        del tables["lm_head.weight"]
    rewrite(folder, lambda tensors: tensors | tables)
    drafter = load(folder)
    hidden = torch.randn(2, 3, 64)
    head = tables["lm_head.weight"] if own_head else target.head[drafted]
    logits = drafter.logits(target, hidden)
    assert logits.shape == (2, 3, VOCAB)
    torch.testing.assert_close(logits[..., drafted], hidden @ head.T)
    others = torch.ones(VOCAB, dtype=torch.bool).index_fill_(0, drafted, False)
    assert (logits[..., others] == -torch.inf).all()
    assert drafter.head_labels(torch.tensor([17, 16, 96])).tolist() == [3, -1, 6]
    with pytest.warns(UserWarning, match="uses the target's embedding and head"):
        save_drafter(drafter, folder)
    torch.testing.assert_close(load(folder).logits(target, hidden), logits)


def test_a_map_of_the_whole_vocabulary_says_nothing(folder):
    rewrite(folder, lambda tensors: tensors | own_tables(torch.arange(VOCAB)))
    drafter = load(folder)
    assert drafter.config.draft_vocab_size is None and "d2t" not in drafter.state_dict()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"lm_head.weight": torch.zeros(7, 64)}, "lm_head has 7 rows, d2t and t2d name 97 of the target's 97 tokens"),
        ({"d2t": torch.tensor([0, 96])}, "d2t does not name 2 different tokens of the target's 97"),
        ({"d2t": torch.tensor([1, 0])}, "d2t does not name 2 different tokens"),
        ({"d2t": torch.tensor([1, 1]), "t2d": torch.arange(97) < 2}, "d2t and t2d name different tokens"),
        ({"mask_hidden": torch.zeros(64)}, "1 unexpected keys, such as mask_hidden"),
        ({"embed_tokens.weight": torch.zeros(97, 32)}, "1 mismatched keys, such as embed_tokens.weight"),
    ],
)
def test_tables_that_do_not_fit_are_refused(folder, tables, message):
    rewrite(folder, lambda tensors: tensors | tables)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "fc.weight"})
    with pytest.raises(ValueError, match="does not fit its config: 1 missing keys, such as fc.weight"):
        load(folder)


def test_what_does_not_fit_is_said_in_the_error_alone(folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"intermediate_size": 128}, {"model_type": "llama"}, {"model_type": "llama", "dflash_config": {}}):
        (folder / "config.json").write_text(json.dumps(config | change))
        try:
            load(folder)
        except ValueError:
            continue
    assert not caplog.records


def test_a_mask_embedding_beside_the_weights_is_refused(folder):
    (folder / "mask_embedding.pt").write_bytes(b"never read")
    with pytest.raises(ValueError, match="mask_embedding.pt is beside the weights"):
        load(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"^cannot read the drafter in '{folder}': .*model.safetensors"):
        load(folder)


def test_a_name_on_the_hub(folder, tmp_path_factory, monkeypatch):
    """By the hub's own client, from its cache on disk; `mask_embedding.pt` is asked for as well, so that it is seen."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load("org/name").config.block_size == 6
    with pytest.raises(
        ValueError, match="^no drafter in 'org/other': there is no such folder, and the hub cannot be reached$"
    ):
        load("org/other")
    for name in ("./nowhere", "some/where/else"):
        with pytest.raises(ValueError, match=f"^no drafter in '{name}': there is no such folder$"):
            load(name)


def test_an_unsupported_key_is_named_with_the_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    config["dflash_config"]["use_swa"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^cannot read the drafter's config in '{folder}': use_swa is True: drafters"):
        load(folder)
