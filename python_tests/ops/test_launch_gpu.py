"""How kernels are launched: errors, streams, a share of the GPU, a second GPU, PTX alone, and tensors of any size."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import (
    IntervalMask,
    block_attn,
    block_attn_decode,
    kv_inject,
    linear,
    linear_cross_entropy,
    masked_cross_entropy,
    reveal,
    sample,
    sample_and_embed,
    soft_embedding,
    verify,
)
from dflash_ext.ops import backends
from python_tests.ops.test_attention import distance

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

ROOT = Path(__file__).parents[2]
HALF = {"device": "cuda", "dtype": torch.bfloat16}

# ------------------------------------------------------------------------------------------------ errors

LAUNCHES = """
#include <cstdio>
#include "common/launch.h"
using namespace dflash;
__global__ void kernel(int) {}
int main() {
  const LaunchShape right[] = {{1, 32}, {2, 32, 0, 2}, {1, 32, 0, 0, true}, {1, 32, 60 << 10}};
  const LaunchShape wrong[] = {{1, 4096}, {32, 32, 0, 32}, {1 << 20, 32, 0, 0, true}, {1, 32, 1 << 30},
                               {(int64_t(1) << 32) + 1, 32}};
  int status = 0;
  const auto launch = [&](const LaunchShape& shape, bool is_right) {
    cudaSetDevice(99);  // what an earlier call left
    const char* error = checked_launch([&] { return launch_kernel(kernel, shape, nullptr, 0); });
    const bool has_left_one = cudaPeekAtLastError() != cudaSuccess;
    if ((error == nullptr) == is_right && !has_left_one) return;
    status = 1;
    std::printf("%lld x %d, %d bytes, cluster %d, cooperative %d: %s; left behind: %d\\n", (long long)shape.blocks,
                shape.threads, shape.shared_bytes, shape.cluster_size, shape.is_cooperative, error ? error : "",
                has_left_one);
  };
  for (const LaunchShape& bad : wrong) {
    launch(bad, false);
    for (const LaunchShape& good : right) launch(good, true);
  }
  return cudaDeviceSynchronize() == cudaSuccess ? status : 2;
}
"""


def test_a_launch_returns_its_own_error_and_leaves_none(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is needed")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        pytest.skip("clusters need compute capability 9.0")
    (tmp_path / "launches.cu").write_text(LAUNCHES)
    flags = ["-std=c++20", f"-arch=sm_{major}{minor}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["nvcc", *flags, "launches.cu", "-o", "launches"], cwd=tmp_path, check=True)
    done = subprocess.run(["./launches"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_native_operators_name_the_numbers_that_do_not_fit():
    """Python's own checks come first in ordinary calls. The CUDA build may bring a C++ library of its own."""
    ops = torch.ops.dflash_ext
    q, bounds = torch.zeros(1, 4, 3, 64, **HALF), torch.zeros(4, 1, 3, dtype=torch.int32, device="cuda").unbind()
    lse, lens = torch.zeros(1, 4, 2, device="cuda"), torch.zeros(2, dtype=torch.int32, device="cuda")
    target = torch.zeros(1, 3, dtype=torch.int64, device="cuda")
    options = (None, None, 0, 0.0, 0.0, 0.0, 0.0)
    for call, message in (
        (partial(ops.block_attn, q, q, q, *bounds, 5, None, None, None, False), "over 5 keys, k has 3"),
        (partial(ops.block_attn, q, q, q, *bounds, 3, None, 1e40, None, False), "scale is 1e+40"),
        (partial(ops.block_attn, q, q, q[..., :32], *bounds, 3, None, None, None, False), "k and v is 32, of q 64"),
        (partial(ops.block_attn_plan, *bounds, 3, 4, 3, 64, False), "4 query heads are no multiple of 3"),
        (
            partial(ops.block_attn_backward, q, None, q, q, q, *bounds, q, lse, None, None, False),
            "must be contiguous [1, 4, 3]",
        ),
        (
            partial(ops.block_attn_decode, q, q, q, *bounds, 9, None, None, False, False, None, None),
            "9 keys, the cache has 3",
        ),
        (partial(ops.decode_mask, lens, lens[[0, 0, 0]], None, 0, 0, 3, 9, False, None, 0), "q_lens is for 3 rows"),
        (partial(ops.masked_cross_entropy, q[0, 0], target, *options), "they have 2 dimensions"),
        (partial(ops.masked_cross_entropy_, q[0].mT, target, *options), "its stride is 64"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()


# ----------------------------------------------------------------------------- what a launch depends on


def calls(device="cuda"):
    """A call of every launcher, by name. The cooperative ones want more blocks than a small share of a GPU holds."""
    torch.manual_seed(0)

    def some(*shape):
        return torch.randn(shape, dtype=torch.bfloat16).to(device)

    train = IntervalMask.block_causal(torch.tensor([3000, 2000], device=device), 16, max_len=3000)
    step = IntervalMask.decode(torch.tensor([900, 7, 400], device=device), 16, kv_len=1000)
    q, k, v = (some(2, heads, 3000, 64) for heads in (8, 2, 2))
    odd = some(2, 8, 3000, 65)[..., 1:]
    x, k_cache, v_cache = some(3, 8, 16, 128), some(3, 2, 1000, 128), some(3, 2, 1000, 128)
    odd_x = some(3, 8, 16, 129)[..., 1:]
    logits, hidden, head, target = some(70, 1000), some(70, 64), some(1000, 64), torch.arange(70, device=device)
    hidden.requires_grad_()
    leaf, wide_leaf = q.clone().requires_grad_(), some(2, 8, 3000, 256).requires_grad_()
    wide_k, wide_v = some(2, 2, 3000, 256), some(2, 2, 3000, 256)

    def gradient(leaf, k, v):
        return torch.autograd.grad(block_attn(leaf, k, v, train).float().square().sum(), leaf)[0]

    features, weight = some(2, 5, 64), some(512, 64)
    positions, vocabulary = torch.arange(5, device=device).repeat(2, 1), some(2, 3, 151_936)
    angles = torch.rand(5, 32, generator=torch.Generator().manual_seed(0)).to(device)

    def injected():
        caches = torch.zeros(2, 2, 2, 2, 6, 64, dtype=torch.bfloat16, device=device)
        kv_inject(features, weight, caches[0], caches[1], positions, angles.cos(), angles.sin())
        return caches

    return {
        "plan": lambda: train.plan(8, 2, 64).tiles,
        "plan of many tiles": lambda: train.plan(32, 1, 512).tiles,
        "forward": lambda: block_attn(q, k, v, train),
        "backward": lambda: gradient(leaf, k, v),
        "backward of wide heads": lambda: gradient(wide_leaf, wide_k, wide_v),
        "portable forward": lambda: block_attn(odd, k, v, train),
        "decode": lambda: block_attn_decode(x, k_cache, v_cache, step),
        "exact decode": lambda: block_attn_decode(x, k_cache, v_cache, step, exact=True),
        "portable decode": lambda: block_attn_decode(odd_x, k_cache, v_cache, step, exact=True),
        "kv_inject": injected,
        "linear": lambda: linear(features, weight),
        "loss": lambda: masked_cross_entropy(logits, target).nll,
        "loss in place": lambda: torch.autograd.grad(linear_cross_entropy(hidden, head, target).loss, hidden)[0],
        "sample": lambda: sample(vocabulary, 3, top_p=0.9).entropy,
        "sample under a soft cap": lambda: sample(vocabulary, 3, softcap=5.0).entropy,
        "verify": lambda: verify(target[:4].view(2, 2), vocabulary).next_token,
        "reveal": lambda: reveal(logits, logits > 0, count=5),
        "soft_embedding": lambda: soft_embedding(logits, head),
        "sample_and_embed": lambda: sample_and_embed(logits, head, 3)[1],
    }


def is_close(got, want):
    """Parts of a sum may be cut elsewhere where there are fewer multiprocessors."""
    return torch.equal(got, want) if not got.is_floating_point() else distance(got, want.double()) < 5e-3


def green_stream(multiprocessors):
    """A stream of a green context that has so many multiprocessors, by the driver's own functions."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        status = getattr(cuda, name)(*arguments)
        if status == 801 or status == 500:  # not supported, not found
            pytest.skip(f"{name}: this driver has no green contexts")
        assert status == 0, f"{name}: {status}"

    whole, part = (ctypes.create_string_buffer(512) for _ in range(2))
    count, device = ctypes.c_uint(1), ctypes.c_int()
    described, context, stream = (ctypes.c_void_p() for _ in range(3))
    call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
    call("cuDeviceGetDevResource", device, whole, 1)
    call("cuDevSmResourceSplitByCount", part, ctypes.byref(count), whole, None, 0, multiprocessors)
    call("cuDevResourceGenerateDesc", ctypes.byref(described), part, 1)
    call("cuGreenCtxCreate", ctypes.byref(context), described, device, 1)
    call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, 1, 0)
    return torch.cuda.ExternalStream(stream.value)


def test_a_green_context_has_a_share_of_the_gpu():
    stream = green_stream(16)
    for name, call in calls().items():
        want = call()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            got = call()
            stream.synchronize()
        assert is_close(got, want), name


SHARE = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
sys.path[:0] = sys.argv[1:3]
from python_tests.ops.test_launch_gpu import calls
print(torch.cuda.get_device_properties(0).multi_processor_count)

def in_a_thread(call):  # of its own, which has made no CUDA call yet
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()

torch.save({name: in_a_thread(call).cpu() for name, call in calls().items()}, sys.argv[3])
"""


def test_mps_gives_a_share_of_the_gpu(tmp_path):
    control = shutil.which("nvidia-cuda-mps-control")
    if not control or subprocess.run([control], input="get_server_list\n", capture_output=True, text=True).returncode:
        pytest.skip("the MPS daemon does not run")
    results = []
    for percent in ("100", "12"):
        path = tmp_path / percent
        done = subprocess.run(
            [sys.executable, "-c", SHARE, str(ROOT), str(Path(__file__).parent), str(path)],
            env=os.environ | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percent},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results.append((int(done.stdout), torch.load(path)))
    (all_of_it, want), (share, got) = results
    assert share < all_of_it
    for name in want:
        assert is_close(got[name], want[name]), name


def test_a_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    here, there = calls("cuda:0"), calls("cuda:1")
    for name, call in there.items():
        got = call()
        assert torch.cuda.current_device() == 0 and got.device.index == 1, name
        assert is_close(got.cpu(), here[name]().cpu()), name


@pytest.mark.parametrize("exact", [False, True])
def test_streams_share_a_plan_for_decoding(exact):
    lens = torch.tensor([5000, 900, 17], dtype=torch.int32, device="cuda")
    mask = IntervalMask.decode(lens, 16, kv_len=5100).plan(32, 8, 128, decode=True)
    q, k, v = (torch.randn(3, heads, length, 128, **HALF) for heads, length in ((32, 16), (8, 5100), (8, 5100)))
    want, plan = block_attn_decode(q, k, v, mask, exact=exact), mask.tiles.clone()
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(block_attn_decode(q, k, v, mask, exact=exact))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs) and torch.equal(mask.tiles, plan)


@pytest.mark.slow
def test_a_build_of_ptx_alone(tmp_path):
    """What runs on GPUs that are newer than the build: compute_80 PTX, which the driver compiles."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is needed")
    for name in ("csrc", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "dflash_ext/__init__.py"):
        source, copy = ROOT / name, tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "lib"],
        cwd=tmp_path,
        env=os.environ | {"DFLASH_EXT_CUDA_ARCHS": ""},
        check=True,
    )
    library = tmp_path / "lib" / "dflash_ext" / "libdflash_ext_ops.so"
    names = "every_mask or options or plan or any_lengths or in_place"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu and not slow", "-k", names]
        + [str(Path(__file__).with_name(name)) for name in ("test_attention_gpu.py", "test_decode_gpu.py")],
        env=os.environ | {"DFLASH_EXT_LIBRARY": str(library), "DFLASH_EXT_GPU": "portable"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ------------------------------------------------------------------------------------- the portable kernels


KERNELS = """
import json, sys, torch
sys.path[:0] = sys.argv[1:3]
from python_tests.ops.test_launch_gpu import calls
found = {}
for name, call in calls().items():
    with torch.profiler.profile() as profile:
        call()
        torch.cuda.synchronize()
    found[name] = [event.key for event in profile.key_averages()]
print(json.dumps(found))
"""


def kernels_of_calls(**environment):
    """The names of this package's kernels that each of `calls` runs, in a process with these variables.

    Kernels that several architectures share are templates. They are named by the team of blocks that takes a row.
    """
    others = {name: value for name, value in os.environ.items() if name != "DFLASH_EXT_GPU"}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(ROOT), str(Path(__file__).parent)],
        env=others | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: set(re.findall(r"\w+_sm[89]0\b|\w+Team\b", " ".join(keys))) for name, keys in found.items()}


def test_the_variable_asks_every_family_for_its_portable_kernels():
    sources = (path.read_text() for path in (ROOT / "csrc").glob("*/*_sm90.cu"))
    hopper = {name for source in sources for name in re.findall(r"__global__[^;{]*?\b(\w+_sm90)\(", source)}
    hopper.add("ClusterTeam")
    portable = kernels_of_calls(DFLASH_EXT_GPU="portable")
    assert not hopper & set().union(*portable.values()), portable
    assert {name for name, kernels in portable.items() if not kernels} == {"linear"}, "PyTorch serves it elsewhere"
    if torch.cuda.get_device_capability()[0] == 9:
        usual = kernels_of_calls()
        assert hopper <= set().union(*usual.values()), "`calls` needs a call of every Hopper kernel"


def warned(call):
    """The reasons of PORTABLE that the call warns of, as if it were the process's first."""
    backends.portable_reasons().value = backends._told = 0
    with pytest.warns() as record:
        call()
        call()  # a second time it says nothing
        torch.cuda.synchronize()
    return [str(warning.message) for warning in record if "portable kernel" in str(warning.message)]


def test_every_reason_for_the_portable_kernel_is_named_once():
    if torch.cuda.get_device_capability()[0] != 9 or os.environ.get("DFLASH_EXT_GPU"):
        pytest.skip("Hopper's kernels do not serve here")
    full = partial(IntervalMask.full, 48, device="cuda")

    def decode(heads=4, head_dim=64, page_size=None, odd=0, **options):
        q = torch.randn(1, heads, 3, head_dim + odd, **HALF)[..., odd:]
        cache = torch.randn(1, 1, 48, head_dim, **HALF)
        table = None
        if page_size:
            cache = cache.view(48 // page_size, page_size, 1, head_dim)
            table = torch.arange(48 // page_size, dtype=torch.int32, device="cuda")[None]
        block_attn_decode(q, cache, cache, full(q_len=3), block_table=table, **options)

    def loss(vocab):
        hidden = torch.randn(4, 8, **HALF).requires_grad_()
        linear_cross_entropy(hidden, torch.randn(vocab, 8, **HALF), torch.arange(4, device="cuda")).loss.backward()

    def forward():
        q, k = torch.randn(1, 1, 48, 65, **HALF)[..., 1:], torch.randn(1, 1, 48, 64, **HALF)
        block_attn(q, k, k, full())

    def gradients(keys=48, odd=0, **options):
        q, k = (torch.randn(1, 1, length, 64, **HALF).requires_grad_() for length in (48, keys))
        upstream = torch.randn(1, 1, 48, 64 + odd, **HALF)[..., odd:]
        mask = IntervalMask.full(keys, q_len=48, device="cuda")
        torch.autograd.grad(block_attn(q, k, k, mask, **options), q, upstream)

    causes = [
        forward,
        partial(decode, odd=1),
        partial(decode, head_dim=264),
        partial(decode, heads=65),
        partial(decode, page_size=8),
        partial(loss, 1001),
        partial(loss, 480_000),
        partial(gradients, odd=1),
        partial(gradients, keys=262_145, deterministic=True),
    ]
    for (op, reason), cause in zip(backends.PORTABLE, causes, strict=True):
        assert [f"dflash_ext.{op}: {reason}: " in message for message in warned(cause)] == [True]


# -------------------------------------------------------------------------- more than 2^31 elements


def room_for(gib):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"{gib} GiB of GPU memory are needed")


@pytest.mark.parametrize("portable", [False, True])
def test_attention_to_more_than_2_31_elements_of_keys(portable):
    room_for(20)
    heads, kv_len, shown = 4, (1 << 31) // 4 // 128 + 4096, 700
    k, v = (torch.empty(1, heads, kv_len, 128, **HALF) for _ in range(2))
    few = [torch.randn(1, heads, shown, 128, **HALF) for _ in range(2)]
    for cache, last in zip((k, v), few, strict=True):
        cache[:, :, -shown:] = last
    q = torch.randn(1, heads, 16, 128 + portable, **HALF)[..., int(portable) :]
    assert k.numel() > 1 << 31
    want = block_attn(q, *few, IntervalMask.full(shown, q_len=16, device="cuda")).double()
    bounds = torch.tensor([kv_len - shown, kv_len, 0, 0], dtype=torch.int32, device="cuda")[:, None, None]
    mask = IntervalMask(*bounds.expand(4, 1, 16).contiguous(), kv_len)
    assert distance(block_attn(q, k, v, mask), want) < 5e-3
    assert distance(block_attn_decode(q, k, v, mask, exact=portable), want) < 5e-3


@pytest.mark.parametrize("portable", [False, True])
def test_attention_of_more_than_2_31_elements_of_queries(portable):
    room_for(24)
    rows = (1 << 31) // 4 // 128 + 1000
    q = torch.empty(1, 4, rows, 128, **HALF)
    q[:, :, -1000:] = torch.randn(1, 4, 1000, 128, **HALF)
    k, v = (torch.randn(1, 1, 64, 128 + portable, **HALF)[..., int(portable) :] for _ in range(2))
    assert q.numel() > 1 << 31
    got = block_attn(q, k, v, IntervalMask.full(64, q_len=rows, device="cuda"))[:, :, -1000:]
    want = block_attn(q[:, :, -1000:].contiguous(), k, v, IntervalMask.full(64, q_len=1000, device="cuda"))
    assert distance(got, want.double()) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("deterministic", "portable"), [(False, False), (True, False), (False, True)])
def test_attention_gradients_of_more_than_2_31_elements(deterministic, portable):
    """Every tensor is that large. Rows see a window, so that the last of them are those of a short sequence."""
    room_for(64)
    rows, shown, checked = (1 << 31) // 4 // 128 + 1000, 1500, 1000
    tensors = [torch.randn(1, 4, rows, 128 + portable, **HALF)[..., int(portable) :] for _ in range(4)]
    assert all(x.numel() > 1 << 31 for x in tensors)

    def gradients(q, k, v, upstream):
        mask = IntervalMask.sliding_window(q.shape[2], 64, device="cuda")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = block_attn(*leaves, mask, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, upstream)

    wanted = [grad[:, :, -checked:].double() for grad in gradients(*(x[:, :, -shown:].clone() for x in tensors))]
    for got, want in zip(gradients(*tensors), wanted, strict=True):
        assert distance(got[:, :, -checked:], want) < 5e-3


def test_losses_of_more_than_2_31_logits():
    room_for(16)
    vocab = 128_256
    rows = (1 << 31) // vocab + 100
    logits = torch.empty(rows, vocab, **HALF)
    logits[-50:].normal_()
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    weight = torch.zeros(rows, device="cuda")
    target[-50:], weight[-50:] = torch.randint(vocab, (50,), device="cuda"), 1.0
    leaf = logits[-50:].detach().float().requires_grad_()
    want = F.cross_entropy(leaf, target[-50:], reduction="none")
    want.sum().backward()
    assert logits.numel() > 1 << 31
    wide = logits.requires_grad_()
    found = masked_cross_entropy(wide, target, weight, reduction="sum")
    torch.testing.assert_close(found.nll[-50:], want.detach(), rtol=1e-4, atol=1e-4)
    found.loss.backward()
    torch.testing.assert_close(wide.grad[-50:].float(), leaf.grad, rtol=1e-2, atol=1e-5)
    wide = wide.detach()
    losses, *_ = torch.ops.dflash_ext.masked_cross_entropy_(
        wide[None], target[None], weight[None], None, 0, 0.0, 0.0, 0.0, 0.0
    )
    torch.testing.assert_close(losses[0, -50:], want.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide[-50:].float(), leaf.grad, rtol=1e-2, atol=1e-5)
