def test_doctor(run):
    code, printed, _ = run("doctor")
    assert code == 0
    for word in ("torch", "block_attn", "masked_cross_entropy", "native"):
        assert word in printed
