from python_tests.data.words import word_tokenizer


def test_doctor(run):
    code, printed, _ = run("doctor")
    assert code == 0
    for word in ("torch", "block_attn", "masked_cross_entropy", "native"):
        assert word in printed


def test_a_drafter_is_examined(workspace, run):
    words = ["doctor", "--drafter", workspace / "drafter", "--target", workspace / "target", "--max-new-tokens", 12]
    code, printed, errors = run(*words, "--prompts", workspace / "prompts.jsonl")
    assert code == 0, errors
    for said in ("as its config says", "taps shifted by +1", "sample_from_anchor", "tau of decoding"):
        assert said in printed
    code, _, errors = run(*words)
    assert code == 1 and "--drafter needs its --target and a file of --prompts" in errors


def test_thinking_on_and_off_are_two_readings(workspace, run):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ ' w009' if enable_thinking else ' w010' }}"
    tokenizer.save_pretrained(workspace / "target")
    words = ["doctor", "--drafter", workspace / "drafter", "--target", workspace / "target", "--max-new-tokens", 12]
    code, printed, errors = run(*words, "--prompts", workspace / "prompts.jsonl")
    assert code == 0, errors
    assert "a chat template with thinking on" in printed and "a chat template with thinking off" in printed
