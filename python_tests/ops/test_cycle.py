"""begin_cycle, end_cycle, write_ring and read_ring against their rules, written out row by row."""

import pytest
import torch

from dflash_ext.ops.cycle import FIELDS, begin_cycle, end_cycle, mark_time, read_ring, write_ring

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


def numbered(dtype: torch.dtype, device: str, *shape: int) -> torch.Tensor:
    """Numbers that no two neighbours share."""
    return (torch.arange(torch.Size(shape).numel()) % 251).view(shape).to(dtype).to(device)


# Tokens of 6,144 bytes are more than one block's share; the others are moved in pieces of 1 to 16 bytes.
@pytest.mark.parametrize(
    "dtype, width",
    [
        *[(torch.int64, 1), (torch.uint8, 3), (torch.bfloat16, 5), (torch.bfloat16, 6), (torch.float32, 6)],
        *[(torch.bfloat16, 8), (torch.float64, 768)],
    ],
)
def test_rings(device, dtype, width):
    """Rows go through a ring of 7 places, which does not hold what it never got, several times."""
    ring, slots = numbered(dtype, device, 5, 7, width), torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    known, starts = {}, [0, 5, 40]
    torch.manual_seed(0)
    for seed in range(12):
        new = torch.randint(0, 4, (3,)).tolist()
        positions = torch.tensor([[s + j if j < n else -1 for j in range(3)] for s, n in zip(starts, new, strict=True)])
        values = numbered(dtype, device, 3, 4, width)[:, seed % 2 : seed % 2 + 3].contiguous() + seed
        before = ring.clone()
        write_ring(ring, values, positions.to(device), slots)
        for i in range(3):
            for j in range(min(new[i], 3)):
                known[i, starts[i] + j] = before[slots[i], (starts[i] + j) % 7] = values[i, j]
        assert torch.equal(ring, before)
        starts = [s + min(n, 3) for s, n in zip(starts, new, strict=True)]
        counts = torch.randint(-1, 10, (3,))
        got, places = read_ring(ring, torch.tensor(starts, device=device), counts.to(device), slots, 9)
        for i, (start, count) in enumerate(zip(starts, counts.tolist(), strict=True)):
            for j in range(9):
                at = start - count + j
                is_there = j < count and at >= max(0, start - 7)
                assert places[i, j] == (at if is_there else -1)
                if not is_there:
                    assert not got[i, j].any()
                elif (i, at) in known:
                    assert torch.equal(got[i, j], known[i, at])
    assert max(starts) > 50 and len(known) > 40


def test_slots_that_do_not_exist_are_refused_on_the_cpu():
    state, _ = made(3, "cpu")
    slots, numbers = torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="begin_cycle: slot 3 is outside the state of 3"):
        begin_cycle(state, slots, 1, 1)
    with pytest.raises(RuntimeError, match="write_ring: slot 3 is outside the ring of 3"):
        write_ring(torch.zeros(3, 4, 1), torch.zeros(2, 1, 1), numbers[:, None], slots.int())
    with pytest.raises(RuntimeError, match="read_ring: slot 3 is outside the ring of 3"):
        read_ring(torch.zeros(3, 4, 1), numbers, numbers, slots.int(), 1)


def test_rings_that_do_not_fit_are_refused():
    ring, numbers = torch.zeros(3, 4, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"write_ring: values must be contiguous \[2, 1, 2\]"):
        write_ring(ring, torch.zeros(2, 1, 3), numbers[:, None], numbers.int())
    with pytest.raises(RuntimeError, match="write_ring: ring has no place for a token"):
        write_ring(ring[:, :0], torch.zeros(2, 1, 2), numbers[:, None], numbers.int())
    with pytest.raises(RuntimeError, match=r"read_ring: counts must be contiguous \[2\]"):
        read_ring(ring, numbers, numbers.int(), numbers.int(), 1)


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
    ring, values = torch.zeros(4, 3, 5, device=device), torch.ones(2, 2, 5, device=device)
    torch.library.opcheck(ops.write_ring.default, (ring, values, tokens[:, :2].contiguous(), slots.int()))
    torch.library.opcheck(ops.read_ring.default, (ring, slots, slots, slots.int(), 2))
    assert len(FIELDS) == state.shape[1]
