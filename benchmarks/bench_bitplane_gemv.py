"""Times the native CPU product at every width beside torch's own products and a plain read of the same memory.

Every provider cycles through its own ring of distinct weights, larger than any cache, so that memory is measured.
Rounds are interleaved (A, B, C, C, B, A): what disturbs the machine disturbs all providers. Medians and quartiles; one
JSON row per provider on standard output, progress on standard error. With one thread the clock is the thread's CPU
time, because a busy machine takes wall time away; with more it is wall time.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from flexquant_rl.kernels import native
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.native import NativeGemv
from flexquant_rl.kernels.reference import bitplane_gemv

CALLS_PER_TURN = 8


@dataclass
class Provider:
    """One way to multiply (or, for the ceiling, to read), with its ring of weights."""

    name: str
    num_bytes: int  # read by one call
    calls: Iterator[Callable[[], object]]
    bit_width: float | None = None
    times_s: list[float] = field(default_factory=list)

    def take_turn(self, clock: Callable[[], float]) -> None:
        """Times the next calls of the ring, one by one."""
        for call in itertools.islice(self.calls, CALLS_PER_TURN):
            start = clock()
            call()
            self.times_s.append(clock() - start)


def ring_of(make: Callable[[], tuple[Tensor, ...]], ring_bytes: int) -> list[tuple[Tensor, ...]]:
    """Returns copies of one weight, each in memory of its own, of `ring_bytes` in total."""
    first = make()
    num_copies = max(2, -(-ring_bytes // sum(tensor.nbytes for tensor in first)))
    return [first, *(tuple(tensor.clone() for tensor in first) for _ in range(num_copies - 1))]


def make_nested(num_outputs: int, num_inputs: int, group_size: int, bit_widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    planes = torch.randint(-(2**31), 2**31 - 1, (8, num_outputs, num_inputs // 32), dtype=torch.int32)
    shape = (len(bit_widths), num_outputs, num_inputs // group_size)
    scale = torch.rand(shape).mul_(0.01).add_(0.01).half()
    return planes, scale, scale.float().mul_(-3.5).half()


def native_providers(args: argparse.Namespace, x: Tensor) -> list[Provider]:
    """One provider per width, all on one ring: width b reads the first b planes of each weight."""
    bit_widths = (*sorted({*args.bit_widths} - {8}), 8)
    tensors = ring_of(lambda: make_nested(args.n, args.k, args.group_size, bit_widths), args.ring_mb << 20)
    weights = [NestedWeight(*parts, bit_widths, args.group_size, args.k) for parts in tensors]
    gemvs = [NativeGemv(w, num_threads=args.num_threads, mode=args.mode, isa=args.isa) for w in weights]
    out = torch.empty(len(x), args.n)
    providers = []
    for bit_width in args.bit_widths:
        check_product(gemvs[0], x, bit_width)
        calls = [lambda gemv=gemv, b=bit_width: gemv(x, bit_width=b, out=out) for gemv in gemvs]
        num_bytes = weights[0].bytes_read(bit_width)
        providers.append(Provider(f"native_{gemvs[0].isa}", num_bytes, itertools.cycle(calls), bit_width))
    planes = [parts[0] for parts in tensors]
    reads = [lambda p=p: native.read_bytes(p, num_threads=args.num_threads, isa=args.isa) for p in planes]
    return [Provider("read", planes[0].nbytes, itertools.cycle(reads)), *providers]


def check_product(gemv: NativeGemv, x: Tensor, bit_width: int) -> None:
    """Stops the benchmark if the first rows are wrong: a fast wrong product is not worth a number."""
    rows = slice(0, 64)
    weight = gemv.weight
    part = NestedWeight(
        weight.planes[:, rows], weight.scale[:, rows], weight.offset[:, rows], weight.bit_widths, weight.group_size,
        weight.num_inputs,
    )  # fmt: skip
    expected = bitplane_gemv(x, part, bit_width=bit_width)
    error = float((gemv(x, bit_width=bit_width)[:, rows] - expected).norm() / expected.norm())
    limit = 0.03 if gemv.mode == "int8" else 1e-4  # int8 activations lose about 0.6%
    if not error < limit:
        sys.exit(f"wrong product: {error:.2g} relative error at {bit_width} bits; run tests/kernels first")


def torch_providers(args: argparse.Namespace, x: Tensor) -> list[Provider]:
    """The products of torch: dense float32 and bfloat16, and the two low-bit ones at their best setting (bfloat16)."""
    ring_bytes = args.ring_mb << 20
    x_half = x.bfloat16()
    dense = torch.randn(args.n, args.k)
    codes4 = torch.randint(0, 16, (args.n, args.k), dtype=torch.int32)
    pairs4 = torch.rand(args.k // 128, args.n, 2).bfloat16()
    scale8 = torch.rand(args.n).bfloat16()
    ops = torch.ops.aten
    int4 = ring_of(lambda: (ops._convert_weight_to_int4pack_for_cpu(codes4, 1),), ring_bytes)
    int8 = ring_of(lambda: (dense.mul(30).to(torch.int8),), ring_bytes)
    bf16 = ring_of(lambda: (dense.bfloat16(),), ring_bytes)
    fp32 = ring_of(lambda: (dense.clone(),), ring_bytes)
    return [
        peer("torch_fp32", 32, fp32, lambda w: functional.linear(x, w)),
        peer("torch_bf16", 16, bf16, lambda w: functional.linear(x_half, w)),
        peer("aten_int8pack_bf16", 8, int8, lambda w: ops._weight_int8pack_mm(x_half, w, scale8)),
        peer("aten_int4pack_g128_bf16", 4, int4, lambda w: ops._weight_int4pack_mm_for_cpu(x_half, w, 128, pairs4)),
    ]


def peer(name: str, bit_width: int, ring: list[tuple[Tensor, ...]], product: Callable[[Tensor], Tensor]) -> Provider:
    calls = [lambda w=weight: product(w) for (weight,) in ring]
    return Provider(name, ring[0][0].nbytes, itertools.cycle(calls), bit_width)


def run(providers: list[Provider], num_rounds: int, num_threads: int) -> None:
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    for provider in providers:
        for call in itertools.islice(provider.calls, 2):
            call()
    for round_idx in range(num_rounds):
        for provider in providers if round_idx % 2 == 0 else reversed(providers):
            provider.take_turn(clock)


def report(providers: list[Provider], args: argparse.Namespace) -> None:
    """Prints one JSON row per provider."""
    read = providers[0]
    read_gb_per_s = read.num_bytes / statistics.median(read.times_s) / 1e9
    common = environment(args)
    for provider in providers:
        p25, p50, p75 = statistics.quantiles(provider.times_s, n=4)
        gb_per_s = provider.num_bytes / p50 / 1e9
        row = {
            "op": "bitplane_gemv",
            "provider": provider.name,
            "bit_width": provider.bit_width,
            "p25_us": round(p25 * 1e6, 1),
            "p50_us": round(p50 * 1e6, 1),
            "p75_us": round(p75 * 1e6, 1),
            "num_samples": len(provider.times_s),
            "bytes": provider.num_bytes,
            "gb_per_s": round(gb_per_s, 2),
            "share_of_read": round(gb_per_s / read_gb_per_s, 3),
        }
        print(json.dumps(row | common), flush=True)


def environment(args: argparse.Namespace) -> dict[str, object]:
    """Returns what a reader needs to judge a row."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "shape": [args.m, args.n, args.k],
        "group_size": args.group_size,
        "mode": args.mode,
        "num_threads": args.num_threads,
        "clock": "thread_cpu" if args.num_threads == 1 else "wall",
        "ring_mb": args.ring_mb,
        "cpu": names[0] if names else platform.processor(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "seed": args.seed,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, default=1, help="tokens, 1 to 16")
    parser.add_argument("--n", type=int, default=4096, help="outputs")
    parser.add_argument("--k", type=int, default=4096, help="inputs, a multiple of 128")
    parser.add_argument("--bit-widths", type=int, nargs="+", default=[3, 4, 5, 6, 8])
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--mode", default="int8", choices=("int8", "float32"))
    parser.add_argument("--isa", default=None, choices=("avx512", "avx2", "portable"))
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--ring-mb", type=int, default=1100, help="distinct weights per provider")
    parser.add_argument("--no-peers", action="store_true", help="leave out torch's products")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    x = torch.randn(args.m, args.k)
    with torch.inference_mode():
        providers = native_providers(args, x)
        if not args.no_peers:
            providers += torch_providers(args, x)
        print(f"{len(providers)} providers, {args.rounds} rounds", file=sys.stderr)
        run(providers, args.rounds, args.num_threads)
    report(providers, args)


if __name__ == "__main__":
    main()
