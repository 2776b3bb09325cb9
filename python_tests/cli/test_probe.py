from dflash_ext.models import Target


def test_a_verdict_a_line(workspace, run):
    code, out, errors = run("probe", "--model", workspace / "target", "--device", "cpu")
    assert code == 0 and not errors
    verdicts = out.splitlines()
    assert len(verdicts) == 9 and {line[:5] for line in verdicts} == {"ok   ", "note "}
    assert "ok    block_attn, interval mask, full_attention: honoured, bidirectional and block-wise" in verdicts


def test_the_exit_code_is_1_if_training_would_be_wrong(workspace, run, monkeypatch):
    monkeypatch.setattr(Target, "mask_arguments", lambda *_: {})
    code, out, _ = run("probe", "--model", workspace / "target", "--device", "cpu", "--attention", "sdpa")
    assert code == 1
    assert "wrong sdpa, mask in float32, full_attention: bidirectional: layer 0 sees 0% of the later tokens" in out


def test_layers_to_adapt(workspace, run):
    words = ("probe", "--model", workspace / "target", "--device", "cpu", "--linear-layers")
    code, out, _ = run(*words, "q_proj,v_proj")
    stacks = "model.layers.*.self_attn.q_proj (6), model.layers.*.self_attn.v_proj (6)"
    assert code == 0 and f"adapter: 12 linear layers: {stacks}" in out.splitlines()[2]
    code, out, _ = run(*words, "c_attn")
    assert code == 1 and "wrong adapter" in out
