import json

from dflash_ext.decode import decode
from dflash_ext.models import Target
from python_tests.data.words import word_tokenizer
from python_tests.tiny import random_prompts, tiny_pair


def test_generate_writes_the_targets_own_tokens(house, run):
    out = house / "out.jsonl"
    code, _, printed = run(
        *("generate", "--target", house / "target", "--drafter", house / "drafter"),
        *("--prompts", house / "prompts.jsonl", "--max-new-tokens", 12, "--output", out),
    )
    assert code == 0 and "tau" in printed
    rows = sorted(map(json.loads, out.read_text().splitlines()), key=lambda r: r["index"])
    target, _ = tiny_pair("llama")
    plain = decode(Target(target.model), None, random_prompts(5, 7, 9), max_new_tokens=12, stop_token_ids=[2])
    tokenizer = word_tokenizer()
    expected = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in plain.completions]
    assert [row["text"] for row in rows] == expected


def test_generate_streams_one_prompt(house, run):
    code, printed, told = run("generate", "w005 w006 w007", "--target", house / "target", "--max-new-tokens", 4)
    assert code == 0 and "w" in printed and "tau" not in printed and "tau" in told
