import json

from dflash_ext.models import load_drafter


def test_train_then_evaluate(house, run):
    """A drafter from prompts in one command, then its figures; a second run reuses the answers."""
    out = house / "trained"
    train = [
        *("train", "--target", house / "target", "--prompts", house / "prompts.jsonl", "--output", out),
        *("--mask-token", "w096", "--layers", 1, "--taps", "1,3", "--block-size", 4, "--steps", 2, "--batch-size", 2),
        *("--anchors", 4, "--max-new-tokens", 16, "--held-out", 0.34),
    ]
    code, printed, errors = run(*train)
    assert code == 0, errors
    drafter = load_drafter(out)
    assert drafter.config.target_layer_ids == [1, 3] and drafter.config.mask_token_id == 96
    assert {p.name for p in out.iterdir()} >= {"answers.jsonl", "config.json", "model.safetensors", "training.json"}
    answers = (out / "answers.jsonl").read_text()
    assert run(*train)[0] == 0
    assert (out / "answers.jsonl").read_text() == answers
    figures = house / "figures.json"
    code, _, errors = run(
        *("evaluate", "--target", house / "target", "--drafter", out, "--prompts", house / "prompts.jsonl"),
        *("--max-new-tokens", 8, "--output", figures),
    )
    assert code == 0, errors
    row = json.loads(figures.read_text())["prompts"]
    assert row["prompts"] == 3 and row["tau"] >= 1 and len(row["acceptance"]) == 3
