"""begin_cycle and end_cycle against their rules, written out row by row."""

import pytest
import torch

from dflash_ext.ops.cycle import FIELDS, begin_cycle, end_cycle, mark_time

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
START, ANCHOR, LAST, ACTIVE = range(4)


def made(slots: int, device: str, seed: int = 0):
    """A state of rows near their ends and far from them, some of them not active."""
    torch.manual_seed(seed)
    start = torch.randint(0, 50, (slots,))
    last = start + torch.randint(-1, 12, (slots,))
    columns = [start, torch.randint(3, 90, (slots,)), last, torch.randint(0, 2, (slots,)), torch.randint(99, (slots,))]
    stops = torch.where(torch.rand(slots, 3) < 0.3, torch.randint(3, 12, (slots, 3)), -1)
    return torch.stack(columns, dim=1).to(device), stops.to(device)


@pytest.mark.parametrize("width, block", [(0, 0), (1, 2), (7, 8), (15, 15), (40, 41)])
def test_begin_cycle(device, width, block):
    state, _ = made(9, device)
    slots = torch.tensor([4, 0, 8, 8, 3], device=device)
    rows = begin_cycle(state, slots, width, block)
    assert rows.slots.tolist() == slots.tolist() and rows.slots.dtype == torch.int32
    for i, slot in enumerate(slots.tolist()):
        start, anchor, last, active, seed = state[slot].tolist()
        room = min(max(last - start, 0), width) if active else 0
        assert [rows.start[i], rows.anchor[i], rows.last[i], rows.active[i], rows.seed[i]] == state[slot].tolist()
        assert rows.room[i] == room and rows.q_len[i] == (room + 1 if active else 0)
        there = [start + j if active and j <= room else -1 for j in range(width + 1)]
        assert rows.positions[i].tolist() == there
        assert rows.block_positions[i].tolist() == [start + j for j in range(block)]
        assert rows.block_places[i].tolist() == [start + j if active else -1 for j in range(block)]


@pytest.mark.parametrize("width", [0, 1, 7, 40])
def test_end_cycle(device, width):
    ended, bad = 0, 0
    for seed in range(8):
        state, stops = made(9, device, seed)
        slots = torch.tensor([4, 0, 8, 3, 5], device=device)
        before, rows = state.clone(), begin_cycle(state, slots, width, 0)
        drafted = torch.randint(3, 12, (5, width)).to(device)
        accepted = (torch.rand(5, device=device) * (rows.room + 1)).long()
        next_token = torch.randint(3, 12, (5,)).to(device)
        logits = torch.zeros(5, width + 1, 12, dtype=DTYPES[seed % len(DTYPES)], device=device)
        # One logit of each row is not finite. It counts where it belongs to the row's next token alone.
        numbers = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
        columns = torch.where(torch.rand(5) < 0.3, accepted.cpu(), torch.randint(width + 1, (5,))).to(device)
        logits[torch.arange(5, device=device), columns, next_token] = numbers[seed % 3].to(logits.dtype)
        records, kept = end_cycle(state, slots, stops, rows, drafted, accepted, next_token, logits)
        want = before.clone()
        for i, slot in enumerate(slots.tolist()):
            start, _, last, active, _ = before[slot].tolist()
            count, token = int(accepted[i]), int(next_token[i])
            finite = bool(logits[i, count, token].isfinite())
            shown = token if finite else -1
            assert records[i].tolist() == [active, int(rows.room[i]), count, shown, *drafted[i].tolist()]
            assert kept[i].tolist() == [start + j if active and j <= count else -1 for j in range(width + 1)]
            if active:
                new = [*drafted[i, :count].tolist(), token]
                goes_on = finite and not set(new) & set(stops[slot].tolist()) and start + count + 1 <= last
                want[slot, [START, ANCHOR, ACTIVE]] = torch.tensor([start + count + 1, token, goes_on], device=device)
                ended += not goes_on
                bad += not finite
        assert torch.equal(state, want)
    assert 0 < ended < 40 and bad > 0


def test_slots_that_do_not_exist_are_refused_on_the_cpu():
    state, _ = made(3, "cpu")
    with pytest.raises(RuntimeError, match="begin_cycle: slot 3 is outside the state of 3"):
        begin_cycle(state, torch.tensor([0, 3]), 1, 1)


def test_a_replayed_graph_reads_the_clock_anew(device):
    if device == "cpu":
        with pytest.raises(RuntimeError, match="mark_time: it reads a GPU's clock"):
            mark_time(torch.empty(0))
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        begin = mark_time(torch.empty(0, device=device))
        torch.cuda._sleep(2_000_000)  # about a millisecond
        end = mark_time(torch.empty(0, device=device))
    times = []
    for _ in range(2):
        graph.replay()
        times += [begin.item(), end.item()]
    assert times == sorted(times) and 3e5 < times[1] - times[0] < 1e7


def test_opcheck(device):
    state, stops = made(4, device)
    slots = torch.tensor([2, 1], device=device)
    ops = torch.ops.dflash_ext
    torch.library.opcheck(ops.begin_cycle.default, (state, slots, 3, 4))
    rows = begin_cycle(state, slots, 3, 4)
    tokens = torch.zeros(2, 3, dtype=torch.int64, device=device)
    committed = tokens, tokens[:, 0] * 1, slots, torch.zeros(2, 4, 5, device=device)
    torch.library.opcheck(ops.end_cycle.default, (state, slots, stops, rows.readings, *committed))
    assert len(FIELDS) == state.shape[1]
