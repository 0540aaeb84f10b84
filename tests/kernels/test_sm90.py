"""What the compiler makes of every kernel for sm_90, without a GPU: registers, spills, barriers, width of loads.

Layout mistakes do not change results: a row that is loaded as a vector and spread afterwards costs shared memory and
barriers inside the loop, and only the machine code shows it. Processes of their own compile the kernels, because those
of the other tests are interpreted. Run as a program, this file prints one JSON object per kernel.

Where the time goes: Triton's coalescing pass takes three quarters of a product of eight tokens, and the disassembler
0.6 s to start. So two processes compile, the longest cases first, and one disassembler reads everything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

UNALIGNED = {"bit_widths_ptr", "bit_width_ptr", "segments_ptr", "bias_ptr", "residual_ptr", "positions_ptr", "rows_ptr"}
TYPES = {"planes_ptr": "*i32", "bit_widths_ptr": "*i32", "bit_width_ptr": "*i32", "segments_ptr": "*i32", "eps": "fp32"}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^\s;]+)\s*(.*?);", re.MULTILINE)


def gemv_case(*, num_words: int, num_tokens: int = 1, words_per_group: int = 4, tile: tuple[int, int, int]) -> Any:
    """Arguments of the product for one compilation."""
    from flexquant_rl.kernels.gemv import _gemv_kernel
    from flexquant_rl.kernels.plane_merge import width_table

    types = {"values_ptr": "*i32", "scale_ptr": "*fp16", "offset_ptr": "*fp16", "out_ptr": "*fp16", "bias_ptr": "*fp16"}
    constants = {
        "NUM_WORDS": num_words,
        "NUM_USED_GROUPS": num_words // words_per_group,
        "NUM_TOKENS": num_tokens,
        "NUM_WIDTHS": 5,
        "MIN_WIDTH": 3,
        "WIDTH_TABLE": width_table((3, 4, 5, 6, 8)),
        "WORDS_PER_GROUP": words_per_group,
        "IS_INT8": True,
        "HAS_SEGMENTS": True,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "BLOCK_ROWS": tile[0],
        "BLOCK_WORDS": tile[1],
        "USE_ASM": True,
    }
    return _gemv_kernel, {**types, "residual_ptr": "*fp16"}, constants, tile[2], True


def cases() -> dict[str, Any]:
    """Name -> (kernel, types of arguments that are not float32 or int32, constants, warps, fused multiply-add)."""
    from flexquant_rl.kernels.activations import _pack_kernel
    from flexquant_rl.kernels.attention import _attend_kernel, _join_kernel
    from flexquant_rl.kernels.dequantize import _dequantize_kernel
    from flexquant_rl.kernels.layer_statistics import _statistics_kernel
    from flexquant_rl.kernels.next_token import _best_kernel, _book_kernel
    from flexquant_rl.kernels.plane_merge import width_table
    from flexquant_rl.kernels.policy_net import _policy_kernel
    from flexquant_rl.kernels.rms_norm import _rms_norm_kernel
    from flexquant_rl.kernels.rotary import _rotary_kernel
    from flexquant_rl.kernels.swiglu import _swiglu_kernel
    from flexquant_rl.kernels.token_signals import _distribution_kernel, _normaliser_kernel, _signals_kernel

    packed = {"values_ptr": "*i32", "x_ptr": "*fp16", "gate_up_ptr": "*fp16", "weight_ptr": "*fp16"}
    inputs = {"NUM_INPUTS": 4096, "NUM_WORDS": 128, "IS_INT8": True}
    one_row, several_rows = {"HAS_ROWS": False, "HAS_ONE_ROW": True}, {"HAS_ROWS": True, "HAS_ONE_ROW": False}
    heads = {"NUM_HEADS": 32, "NUM_KEY_HEADS": 8, "HEAD_DIM": 128, "HAS_NORM": True, "BLOCK_HALF": 64}
    names = ("q_norm_ptr", "k_norm_ptr", "keys_ptr", "values_ptr", "out_ptr")
    cache = {**dict.fromkeys(names, "*fp16"), "positions_ptr": "*i64", "rows_ptr": "*i64"}
    pairs = {"scale_ptr": "*fp16", "offset_ptr": "*fp16", "out_ptr": "*fp16"}
    dense = {
        "NUM_INPUTS": 4096,
        "NUM_WORDS": 128,
        "NUM_WIDTHS": 5,
        "MIN_WIDTH": 3,
        "WIDTH_TABLE": width_table((3, 4, 5, 6, 8)),
        "GROUP_SIZE": 128,
        "BLOCK_ROWS": 4,
        "BLOCK_WORDS": 32,
        "USE_ASM": True,
    }
    network = {
        "NUM_GLOBAL": 28,
        "NUM_PER_UNIT": 14,
        "NUM_HIDDEN": 64,
        "NUM_WIDTHS": 5,
        "HAS_LOGITS": False,
        "BLOCK_GLOBAL": 32,
        "BLOCK_UNIT": 16,
        "BLOCK_WIDTHS": 8,
    }
    parts = {"HEAD_DIM": 128, "PLACES_PER_PART": 64}
    grouped = {"NUM_KEY_HEADS": 8, "GROUP": 4, "BLOCK_GROUP": 16, "BLOCK_DIM": 128, "BLOCK_PLACES": 64}
    grouped["IS_EXACT"] = False
    halves = dict.fromkeys(("queries_ptr", "keys_ptr", "values_ptr"), "*fp16")
    halves |= dict.fromkeys(("positions_ptr", "rows_ptr"), "*i64")
    joined = {"NUM_HEADS": 32, "NUM_PARTS": 32, "NUM_WORDS": 128, "IS_INT8": True, "BLOCK_PARTS": 32}
    vocabulary = {"VOCAB_SIZE": 128_256, "NUM_BLOCKS": 126, "BLOCK": 1024}
    counters = dict.fromkeys(("seed_ptr", "count_ptr", "position_ptr", "token_ptr", "token_log_ptr"), "*i64")
    chosen = {**counters, "best_token_ptr": "*i32", "width_log_ptr": "*i32"}
    booked = {"NUM_BLOCKS": 126, "IS_FIRST": False, "BLOCK_BLOCKS": 128, "BLOCK_UNITS": 64}
    vector = {"NUM_BLOCKS": 126, "NUM_DIMS": 16, "NUM_CONSTANTS": 10, "IS_FIRST": False}
    vector |= {"BLOCK_BLOCKS": 128, "BLOCK_UNITS": 64, "BLOCK_DIMS": 16, "BLOCK_CONSTANTS": 16}
    return {
        "gemv": gemv_case(num_words=512, tile=(4, 128, 4)),
        "gemv_masked": gemv_case(num_words=344, tile=(4, 128, 4)),
        "gemv_one_warp": gemv_case(num_words=64, tile=(4, 32, 1)),
        "gemv_group_32": gemv_case(num_words=512, words_per_group=1, tile=(4, 128, 4)),
        "gemv_2_tokens": gemv_case(num_words=512, num_tokens=2, tile=(4, 128, 4)),
        "gemv_4_tokens": gemv_case(num_words=512, num_tokens=4, tile=(4, 128, 4)),
        "gemv_5_tokens": gemv_case(num_words=512, num_tokens=5, tile=(4, 128, 4)),
        "gemv_8_tokens": gemv_case(num_words=512, num_tokens=8, tile=(4, 128, 4)),
        "gemv_8_tokens_masked": gemv_case(num_words=344, num_tokens=8, tile=(4, 128, 4)),
        "gemv_8_tokens_long": gemv_case(num_words=896, num_tokens=8, tile=(4, 128, 4)),
        "gemv_8_tokens_short": gemv_case(num_words=48, num_tokens=8, tile=(4, 32, 1)),
        "gemv_16_tokens": gemv_case(num_words=512, num_tokens=16, tile=(4, 128, 4)),
        "gemv_16_tokens_masked": gemv_case(num_words=344, num_tokens=16, tile=(4, 128, 4)),
        "gemv_16_tokens_short": gemv_case(num_words=48, num_tokens=16, tile=(4, 32, 1)),
        "pack_activations": (_pack_kernel, packed, {**inputs, "BLOCK_WORDS": 32}, 4, False),
        "rms_norm": (_rms_norm_kernel, packed, {**inputs, "BLOCK_WORDS": 128}, 8, False),
        "swiglu": (_swiglu_kernel, packed, {**inputs, "BLOCK_WORDS": 32}, 4, False),
        "rotary": (_rotary_kernel, cache, {**heads, **one_row}, 1, True),
        "rotary_rows": (_rotary_kernel, cache, {**heads, **several_rows}, 1, True),
        "dequantize": (_dequantize_kernel, pairs, dense, 1, True),
        "policy_net": (_policy_kernel, {"out_ptr": "*i32"}, network, 4, True),
        "attend": (_attend_kernel, halves, {**parts, **grouped, **one_row}, 8, True),
        "attend_rows": (_attend_kernel, halves, {**parts, **grouped, **several_rows}, 8, True),
        "attend_long": (_attend_kernel, halves, {**parts, **grouped, **one_row, "PLACES_PER_PART": 256}, 8, True),
        "join_attention": (
            _join_kernel,
            {"values_ptr": "*i32", "positions_ptr": "*i64"},
            {**parts, **joined},
            4,
            False,
        ),
        "layer_statistics": (_statistics_kernel, {}, {"NUM_INPUTS": 4096, "BLOCK": 4096}, 8, True),
        "best_token": (
            _best_kernel,
            {**counters, "token_ptr": "*i32"},
            {"VOCAB_SIZE": 128_256, "IS_FIRST": False, "BLOCK": 1024},
            4,
            True,
        ),
        "book_token": (_book_kernel, chosen, booked, 1, True),
        "normaliser": (_normaliser_kernel, {}, vocabulary, 4, True),
        "distribution": (_distribution_kernel, {}, {**vocabulary, "BLOCK_BLOCKS": 128}, 4, True),
        "signals": (_signals_kernel, {**counters, "layer_ptr": "*i32"}, vector, 4, True),
    }


def compile_case(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, fp_fusion: bool
) -> bytes:
    """Compiles for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    defaults = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature = {name: "constexpr" if name in constants else {**defaults, **TYPES, **types}[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") and name not in UNALIGNED]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": fp_fusion}
    binary: bytes = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    return binary


def machine_code(binary: bytes) -> bytes:
    """The section of an ELF file that holds the kernel's instructions."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    entry_bytes, num_sections, names_idx = struct.unpack_from("<3H", binary, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", binary, table + i * entry_bytes) for i in range(num_sections)]
    names_offset = sections[names_idx][4]
    codes = [
        binary[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if binary.startswith(b".text.", names_offset + name)
    ]
    assert len(codes) == 1, "a file holds one kernel"
    return codes[0]


def run_tool(name: str, data: bytes, *options: str) -> str:
    """What a tool of CUDA, as Triton brings them along, says about a file."""
    import triton

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel"
        path.write_bytes(data)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


def disassemble(codes: list[bytes]) -> list[list[tuple[int, str, str]]]:
    """Address, operation and operands of every instruction of each kernel; the last is a jump's target."""
    listing = INSTRUCTION.findall(run_tool("nvdisasm", b"".join(codes), "--binary", "SM90a"))
    everything = [(int(address, 16), op, rest) for address, op, rest in listing]
    assert 16 * len(everything) == sum(map(len, codes)), "the listing is not understood"
    kernels, first = [], 0
    for code in codes:
        kernels.append(everything[first : first + len(code) // 16])
        first += len(code) // 16
    return kernels


def count(binary: bytes, instructions: list[tuple[int, str, str]]) -> dict[str, Any]:
    """Counts what the machine code of a kernel holds."""
    usage = run_tool("cuobjdump", binary, "-res-usage")
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert resources is not None, usage
    assert len(instructions) > 50, "the listing is not understood"
    loops = []
    for address, op, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append(Counter(o for a, o, _ in instructions if int(target[1], 16) <= a <= address))
    counts = Counter(op for _, op, _ in instructions)
    return {
        "registers": int(resources[1]),
        "stack_bytes": int(resources[2]) + int(resources[4]),
        "counts": counts,
        "loops": loops,
    }


NAMES = (
    "gemv gemv_masked gemv_one_warp gemv_group_32 gemv_2_tokens gemv_4_tokens gemv_5_tokens gemv_8_tokens "
    "gemv_8_tokens_masked gemv_8_tokens_long gemv_8_tokens_short "
    "gemv_16_tokens gemv_16_tokens_masked gemv_16_tokens_short "
    "pack_activations rms_norm swiglu rotary rotary_rows dequantize policy_net attend attend_rows attend_long "
    "join_attention layer_statistics best_token book_token normaliser distribution signals"
).split()
GEMV_NAMES = [name for name in NAMES if name.startswith("gemv")]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Everything, compiled once in another process."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, result.stdout.splitlines())}


def loads(counts: dict[str, int], kind: str) -> int:
    return sum(count for op, count in counts.items() if op.startswith("LDG.E") and kind in op)


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # all of them take minutes on a busy machine, once


@pytest.mark.parametrize("name", NAMES)
def test_no_spills_and_few_registers(compiled: dict[str, Any], name: str) -> None:
    row = compiled[name]
    assert row["stack_bytes"] == 0
    assert not [op for op in row["counts"] if op.startswith(("LDL", "STL"))]
    # Sixteen tokens have as many sums: four programs share a multiprocessor instead of five.
    assert row["registers"] <= (128 if name.startswith("gemv_16") else 96)


# A long part's products go through the tensor cores, block after block: shared memory belongs to that.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "attend_long"])
def test_no_barrier_in_a_loop(compiled: dict[str, Any], name: str) -> None:
    unwanted = ("BAR", "WARPSYNC", "MEMBAR", "STS", "LDS", "STSM", "SHFL", "ATOM", "RED")
    loops = compiled[name]["loops"]
    assert len(loops) == (2 if name in GEMV_NAMES else 0)
    for loop in loops:
        assert not [op for op in loop if op.startswith(unwanted)]


@pytest.mark.parametrize("name", GEMV_NAMES)
def test_the_product_reads_vectors(compiled: dict[str, Any], name: str) -> None:
    """Per token 8 quads, a scale and a sum; per body one vector for every plane: all of 16 bytes."""
    tokens = int(name.split("_")[1]) if "tokens" in name else 1
    planes = sorted(loads(loop, "EF.128") for loop in compiled[name]["loops"])
    assert planes == [4, 8]
    for loop in compiled[name]["loops"]:
        assert loads(loop, ".128") - loads(loop, "EF.128") == 10 * tokens
        assert sum(count for op, count in loop.items() if op.startswith("IDP.4A")) == 32 * tokens
        # What is left are the two loads of half-precision pairs, one for every group of the thread.
        assert loads(loop, "") - loads(loop, ".128") <= 2


@pytest.mark.parametrize("name", [name for name in GEMV_NAMES if name != "gemv_group_32"])
def test_a_token_is_summed_up_alike_whatever_their_number(compiled: dict[str, Any], name: str) -> None:
    """The same fused and plain additions for each: the compiler has not rearranged the sums of some tokens.

    Of a group's four words one is scaled, the others are scaled and added (3 fused); their sums are added (3 plain);
    then come scale and offset (2 fused). All tokens share a fused one that makes the offset.
    """
    tokens = int(name.split("_")[1]) if "tokens" in name else 1
    for loop in compiled[name]["loops"]:
        fused, plain = (sum(n for op, n in loop.items() if op.startswith(kind)) for kind in ("FFMA", "FADD"))
        assert (fused, plain) == (5 * tokens + 1, 3 * tokens)


@pytest.mark.parametrize(("name", "wide"), [("pack_activations", 1), ("rms_norm", 4), ("swiglu", 2), ("dequantize", 8)])
def test_the_others_read_vectors(compiled: dict[str, Any], name: str, wide: int) -> None:
    counts = compiled[name]["counts"]
    assert loads(counts, ".128") >= wide
    # Dequantise also reads the width and a pair, each once.
    assert loads(counts, "") - loads(counts, ".128") <= (3 if name == "dequantize" else 0)


def test_the_list_of_names_is_complete(compiled: dict[str, Any]) -> None:
    assert sorted(compiled) == sorted(NAMES)


def compile_named(name: str) -> tuple[str, bytes]:
    """One case of `cases`, in a process of the pool."""
    return name, compile_case(*cases()[name])


def num_tokens(name: str) -> int:
    """Of a case; the time that it takes grows with them."""
    return int(cases()[name][2].get("NUM_TOKENS", 1))


if __name__ == "__main__":
    order = sorted(cases(), key=num_tokens, reverse=True)  # also imports the kernels, once for all processes
    with multiprocessing.get_context("fork").Pool(2) as pool:
        binaries = dict(pool.imap_unordered(compile_named, order))
    kernels = disassemble([machine_code(binary) for binary in binaries.values()])
    for (case_name, case_binary), case_kernel in zip(binaries.items(), kernels, strict=True):
        print(json.dumps({"name": case_name, **count(case_binary, case_kernel)}))
