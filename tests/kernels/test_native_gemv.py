"""The native CPU product against float64 and integer references, for every instruction set this machine has."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.kernels import native, native_build
from flexquant_rl.kernels.bitplane import NestedWeight, pack_codes, padded_inputs, unpack_codes
from flexquant_rl.kernels.native import Isa, Mode, NativeGemv
from flexquant_rl.kernels.reference import dequantize

WIDTHS = range(1, 9)
GROUP_SIZES = (32, 64, 128)
SHAPES = [  # (N, K)
    *[(1, 64), (361, 64), (172, 172), (17, 352), (3, 4096)],
    *[(19, 640), (37, 768), (9, 896), (5, 1280), (11, 1920)],  # rows that share vectors with their neighbours
]
NUM_TOKENS = (1, 2, 3, 5, 16)
STORED_WIDTHS = (3, 4, 5, 6, 8)
# Float32 sums of 4096 products keep about six digits; a wrong bit, scale or input shows in the first three.
FLOAT32_TOLERANCE = 1e-5
ISAS = native.supported_isas()

needs_library = pytest.mark.skipif(not ISAS, reason="no C++ compiler here, so no native kernels")
each_isa = pytest.mark.parametrize("isa", [pytest.param(isa, marks=needs_library) for isa in ISAS] or ["portable"])


def make_weight(num_outputs: int, num_inputs: int, group_size: int, *, seed: int = 0) -> NestedWeight:
    """Returns a weight with random codes whose values are centred on zero at every width, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_outputs, num_inputs), dtype=torch.uint8, generator=generator)
    num_groups = padded_inputs(num_inputs) // group_size
    spread = torch.rand(num_outputs, num_groups, generator=generator) + 0.5
    scale = torch.stack([spread * 2.0**-b for b in STORED_WIDTHS])
    offset = torch.stack([-spread * (0.5 + 0.1 * i) for i in range(len(STORED_WIDTHS))])
    return NestedWeight(pack_codes(codes), scale.half(), offset.half(), STORED_WIDTHS, group_size, num_inputs)


def make_activations(num_tokens: int, num_inputs: int, *, seed: int = 1) -> Tensor:
    """Returns activations with a few outliers and one block of zeros."""
    x = torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(seed))
    x[:, ::37] *= 20.0
    x[:, 32:64] = 0.0
    return x


def poisoned(num_tokens: int, num_outputs: int) -> Tensor:
    return torch.full((num_tokens, num_outputs), torch.nan)


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 values `[M, Kp]` (as int64) and float32 scales `[M, Kp / 32]`, rounded as the kernel promises to."""
    num_tokens, num_inputs = x.shape
    padded = torch.zeros(num_tokens, padded_inputs(num_inputs))
    padded[:, :num_inputs] = x
    words = padded.view(num_tokens, -1, 32)
    largest = words.abs().amax(2, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    values = torch.round(words * inverse)  # to the nearest, ties to even
    return values.view(num_tokens, -1).long(), (largest / 127.0)[..., 0]


def int8_reference(x: Tensor, weight: NestedWeight, bit_width: int) -> Tensor:
    """Integer dot products per 32 inputs; everything after them in float64. `[M, N]`."""
    values, word_scale = round_activations(x)
    num_padded = values.shape[1]
    codes = unpack_codes(weight.planes, bit_width=bit_width, num_inputs=num_padded).long()
    scale, offset = (pair.double() for pair in weight.scale_and_offset(bit_width))
    words_per_group = weight.group_size // 32
    # The largest sum, 32 * 255 * 127, is far below 2^53: float64 holds these integers exactly.
    dots = torch.einsum("mwi,nwi->mnw", values.view(len(x), -1, 32).double(), codes.view(len(codes), -1, 32).double())
    sums = values.view(len(x), -1, 32).sum(2).double() * word_scale.double()
    scaled = (dots * word_scale.double()[:, None]) * scale.repeat_interleave(words_per_group, 1)
    return scaled.sum(2) + sums @ offset.repeat_interleave(words_per_group, 1).T


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@each_isa
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_float32_mode_matches_float64(isa: Isa, group_size: int, num_outputs: int, num_inputs: int) -> None:
    weight = make_weight(num_outputs, num_inputs, group_size)
    gemv = NativeGemv(weight, mode="float32", isa=isa)
    x = make_activations(max(NUM_TOKENS), num_inputs)
    for bit_width in WIDTHS:
        expected = x.double() @ dequantize(weight, bit_width=bit_width).double().T
        for num_tokens in NUM_TOKENS:
            y = gemv(x[:num_tokens], bit_width=bit_width, out=poisoned(num_tokens, num_outputs))
            error = relative_error(y, expected[:num_tokens])
            assert error < FLOAT32_TOLERANCE, f"b={bit_width} M={num_tokens}: {error}"


@each_isa
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_int8_mode_matches_integer_emulation(isa: Isa, group_size: int, num_outputs: int, num_inputs: int) -> None:
    weight = make_weight(num_outputs, num_inputs, group_size)
    gemv = NativeGemv(weight, isa=isa)
    x = make_activations(max(NUM_TOKENS), num_inputs)
    for bit_width in WIDTHS:
        expected = int8_reference(x, weight, bit_width)
        for num_tokens in NUM_TOKENS:
            y = gemv(x[:num_tokens], bit_width=bit_width, out=poisoned(num_tokens, num_outputs))
            error = relative_error(y, expected[:num_tokens])
            assert error < FLOAT32_TOLERANCE, f"b={bit_width} M={num_tokens}: {error}"


@each_isa
@pytest.mark.parametrize("mode", ["int8", "float32"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_inputs", [64, 172, 352, 1056])
def test_exact_where_float32_is_exact(isa: Isa, mode: Mode, group_size: int, num_inputs: int) -> None:
    """Integer activations of at most 127 and power-of-two scales leave nothing to round: the results must be equal."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (17, num_inputs), dtype=torch.uint8, generator=generator)
    num_groups = padded_inputs(num_inputs) // group_size
    exponents = torch.randint(0, 2, (1, 17, num_groups), generator=generator)
    offsets = torch.randint(-64, 64, (1, 17, num_groups), generator=generator)
    # The largest sums, where saturating arithmetic would show; everything stays below 2^24 halves.
    codes[0] = 255
    exponents[:, 0] = 0
    x = torch.randint(-9, 10, (3, num_inputs), generator=generator).float()
    x[:, ::32] = 127.0
    x[0, :128] = 127.0
    x[1, :128] = -127.0
    weight = NestedWeight(pack_codes(codes), (2.0**exponents).half(), offsets.half(), (8,), group_size, num_inputs)
    gemv = NativeGemv(weight, mode=mode, isa=isa)
    for bit_width in WIDTHS:
        expected = x.double() @ dequantize(weight, bit_width=bit_width).double().T
        assert torch.equal(gemv(x, bit_width=bit_width, out=poisoned(3, 17)).double(), expected), f"b={bit_width}"


@needs_library
@pytest.mark.parametrize("num_inputs", [64, 172, 4096])
def test_all_isas_round_activations_alike(num_inputs: int) -> None:
    """One output whose weight is 1 at one input and 0 elsewhere returns that input as rounded."""
    x = make_activations(1, num_inputs)
    x[0, 1] = x[0, 0].abs() * 2.5 / 127.0  # a tie if the first input is the largest of its word
    values, word_scale = round_activations(x)
    rounded = values.view(1, -1, 32) * word_scale[..., None]
    inputs = [0, 1, 5, 31, 63, num_inputs - 1]
    codes = torch.zeros(len(inputs), num_inputs, dtype=torch.uint8)
    codes[range(len(inputs)), inputs] = 1
    shape = (1, len(inputs), padded_inputs(num_inputs) // 32)
    weight = NestedWeight(pack_codes(codes), torch.ones(shape).half(), torch.zeros(shape).half(), (8,), 32, num_inputs)
    for isa in ISAS:
        y = NativeGemv(weight, isa=isa)(x, bit_width=8, out=poisoned(1, len(inputs)))
        assert torch.equal(y[0], rounded.view(-1)[inputs].float()), isa


@each_isa
@pytest.mark.parametrize("mode", ["int8", "float32"])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(768, 128), (1056, 64), (4096, 128)])
def test_same_bits_for_any_threads(isa: Isa, mode: Mode, num_inputs: int, group_size: int) -> None:
    weight = make_weight(512, num_inputs, group_size)
    x = make_activations(16, num_inputs)
    one, two, many = (NativeGemv(weight, mode=mode, isa=isa, num_threads=threads) for threads in (1, 2, 5))
    for bit_width in (1, 3, 4, 5, 8):
        expected = one(x, bit_width=bit_width, out=poisoned(16, 512))
        for gemv in (two, many):
            for _ in range(5):
                assert torch.equal(gemv(x, bit_width=bit_width, out=poisoned(16, 512)), expected)


@each_isa
@pytest.mark.parametrize("mode", ["int8", "float32"])
@given(data=st.data())
@settings(max_examples=40)
def test_a_pass_over_tokens_has_the_bits_of_single_tokens(isa: Isa, mode: Mode, data: st.DataObject) -> None:
    """Any number of tokens of any shape, with one thread and with two, whatever was in the result before."""
    group_size = data.draw(st.sampled_from(GROUP_SIZES), "group size")
    num_inputs = data.draw(st.integers(1, 1400) | st.sampled_from([896, 1152, 2432, 4864]), "inputs")
    num_outputs = data.draw(st.integers(1, 70), "outputs")
    num_tokens, bit_width = data.draw(st.integers(1, 16), "tokens"), data.draw(st.integers(1, 8), "width")
    seed = data.draw(st.integers(0, 2**31), "seed")
    weight = make_weight(num_outputs, num_inputs, group_size, seed=seed)
    x = make_activations(num_tokens, num_inputs, seed=seed + 1) * torch.logspace(-3, 3, num_tokens)[:, None]
    alone = NativeGemv(weight, mode=mode, isa=isa)
    expected = torch.cat([alone(row[None], bit_width=bit_width, out=poisoned(1, num_outputs)) for row in x])
    assert expected.isfinite().all()
    for num_threads in (1, 2):
        gemv = NativeGemv(weight, mode=mode, isa=isa, num_threads=num_threads)
        y = gemv(x, bit_width=bit_width, out=poisoned(num_tokens, num_outputs))
        assert torch.equal(y, expected)


@each_isa
@pytest.mark.parametrize("mode", ["int8", "float32"])
@pytest.mark.parametrize("num_inputs", [100, 768, 896, 2048])
def test_every_number_of_tokens_at_every_width(isa: Isa, mode: Mode, num_inputs: int) -> None:
    """The property above, with none left to chance."""
    weight = make_weight(93, num_inputs, 128)
    x = make_activations(16, num_inputs)
    one, two = (NativeGemv(weight, mode=mode, isa=isa, num_threads=threads) for threads in (1, 2))
    for bit_width in WIDTHS:
        expected = torch.cat([one(row[None], bit_width=bit_width, out=poisoned(1, 93)) for row in x])
        for num_tokens, gemv in itertools.product(range(1, 17), (one, two)):
            y = gemv(x[:num_tokens], bit_width=bit_width, out=poisoned(num_tokens, 93))
            assert torch.equal(y, expected[:num_tokens]), f"b={bit_width} M={num_tokens}"


@each_isa
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_inputs", [128, 256, 384, 512, 640, 768, 896, 1152, 1280, 1792, 1920, 2048, 4096])
def test_same_bits_for_a_row_alone(isa: Isa, group_size: int, num_inputs: int) -> None:
    """Rows that share vectors with their neighbours have the sums that they have alone, in whatever order."""
    weight = make_weight(15, num_inputs, group_size)
    x = make_activations(2, num_inputs)
    for num_tokens in (1, 2):
        for bit_width in WIDTHS:
            expected = NativeGemv(weight, isa=isa)(x[:num_tokens], bit_width=bit_width, out=poisoned(num_tokens, 15))
            for row in (0, 1, 2, 3, 7, 14):
                parts = (part[:, row : row + 1] for part in (weight.planes, weight.scale, weight.offset))
                alone = NestedWeight(*parts, STORED_WIDTHS, group_size, num_inputs)
                y = NativeGemv(alone, isa=isa)(x[:num_tokens], bit_width=bit_width)
                assert torch.equal(y[:, 0], expected[:, row]), f"b={bit_width} M={num_tokens} row {row}"


@each_isa
@pytest.mark.parametrize("mode", ["int8", "float32"])
def test_lower_planes_are_not_read(isa: Isa, mode: Mode) -> None:
    weight = make_weight(17, 352, 32)
    x = make_activations(2, 352)
    gemv = NativeGemv(weight, mode=mode, isa=isa)
    for bit_width in range(8, 0, -1):
        expected = gemv(x, bit_width=bit_width)
        weight.planes[bit_width:] = torch.randint(-(2**31), 2**31 - 1, weight.planes[bit_width:].shape)
        assert torch.equal(gemv(x, bit_width=bit_width, out=poisoned(2, 17)), expected), f"b={bit_width}"


@each_isa
@pytest.mark.parametrize("mode", ["int8", "float32"])
def test_padding_is_not_read(isa: Isa, mode: Mode) -> None:
    """Garbage in padded codes and in memory after the activations leaves the result alone."""
    weight = make_weight(17, 172, 128)
    memory = make_activations(1, 512)
    gemv = NativeGemv(weight, mode=mode, isa=isa)
    expected = gemv(memory[:, :172], bit_width=8)
    memory[:, 172:] = torch.nan
    weight.planes[..., 6:] = -1  # words 6 and 7 hold inputs 192..255, all of them padding
    assert torch.equal(gemv(memory[:, :172], bit_width=8, out=poisoned(1, 17)), expected)


@each_isa
def test_slices_and_strides(isa: Isa) -> None:
    """A slice of rows, strided activations and a strided result are used in place."""
    weight = make_weight(40, 352, 64)
    rows = slice(8, 29)
    part = NestedWeight(weight.planes[:, rows], weight.scale[:, rows], weight.offset[:, rows], STORED_WIDTHS, 64, 352)
    x = make_activations(3, 1000)[:, 100:452]
    out = poisoned(3, 50)
    expected = NativeGemv(weight, isa=isa)(x.contiguous(), bit_width=5)[:, rows]
    contiguous_pairs = NestedWeight(
        part.planes, part.scale.contiguous(), part.offset.contiguous(), STORED_WIDTHS, 64, 352
    )
    for piece in (part, contiguous_pairs):
        y = NativeGemv(piece, isa=isa)(x, bit_width=5, out=out[:, 10:31])
        assert torch.equal(y, expected)
    assert out[:, :10].isnan().all()
    assert out[:, 31:].isnan().all()


@each_isa
@pytest.mark.parametrize("num_inputs", [768, 896, 2048])
def test_planes_may_lie_apart(isa: Isa, num_inputs: int) -> None:
    """As the lean decoder lays them out, also where rows share vectors or go in pairs; the gaps are not read."""
    weight = make_weight(15, num_inputs, 128)
    num_words = weight.planes[0].numel()
    spread = torch.full((8, num_words + 96), -1, dtype=torch.int32)
    spread[:, :num_words] = weight.planes.flatten(1)
    planes = spread[:, :num_words].view(weight.planes.shape)
    apart = NestedWeight(planes, weight.scale, weight.offset, STORED_WIDTHS, 128, num_inputs)
    x = make_activations(1, num_inputs)
    for bit_width in WIDTHS:
        expected = NativeGemv(weight, isa=isa)(x, bit_width=bit_width)
        spread[:, num_words:] = -1 - spread[:, num_words:]
        assert torch.equal(NativeGemv(apart, isa=isa)(x, bit_width=bit_width), expected), f"b={bit_width}"


@each_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["int8", "float32"])
def test_non_finite_activations_show(isa: Isa, mode: Mode, bad: float) -> None:
    x = make_activations(2, 172)
    x[1, 100] = bad
    y = NativeGemv(make_weight(17, 172, 32), mode=mode, isa=isa)(x, bit_width=4)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@each_isa
def test_zero_and_tiny_activations(isa: Isa) -> None:
    weight = make_weight(17, 172, 32)
    gemv = NativeGemv(weight, isa=isa)
    assert torch.equal(gemv(torch.zeros(1, 172), bit_width=8), torch.zeros(1, 17))
    assert gemv(torch.full((1, 172), 1e-42), bit_width=8).abs().max() < 1e-30


@needs_library
def test_two_callers_share_the_pool() -> None:
    weight = make_weight(1024, 1024, 128)
    gemv = NativeGemv(weight, num_threads=2)
    x = make_activations(1, 1024)
    expected = gemv(x, bit_width=8)
    failures: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            if not torch.equal(gemv(x, bit_width=8), expected):
                failures.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_pool_survives_a_fork() -> None:
    """A forked child has no worker threads; it must neither hang nor compute anything else."""
    script = """
        import os, torch
        from flexquant_rl.kernels.bitplane import NestedWeight
        from flexquant_rl.kernels.native import NativeGemv
        planes = torch.randint(-(2**31), 2**31 - 1, (8, 1024, 32), dtype=torch.int32)
        pair = torch.ones(1, 1024, 8).half()
        gemv = NativeGemv(NestedWeight(planes, pair, pair, (8,), 128, 1024), num_threads=2)
        x = torch.ones(1, 1024)
        expected = gemv(x, bit_width=8)
        child = os.fork()
        equal = all(torch.equal(gemv(x, bit_width=8), expected) for _ in range(20))
        if child == 0:
            os._exit(0 if equal else 3)
        assert equal and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


@needs_library
def test_mistakes_are_value_errors() -> None:
    weight = make_weight(17, 352, 64)
    gemv = NativeGemv(weight)
    x = make_activations(2, 352)
    unaligned = torch.frombuffer(bytearray(4 * 352 + 4), dtype=torch.uint8)[2 : 2 + 4 * 352]
    mistakes = [
        ({"x": x, "bit_width": 0}, "bit_width=0"),
        ({"x": x, "bit_width": 9}, "bit_width=9"),
        ({"x": x.double(), "bit_width": 8}, "float64"),
        ({"x": x[:, :351], "bit_width": 8}, "352"),
        ({"x": x[0], "bit_width": 8}, "M, 352"),
        ({"x": x.T.contiguous().T, "bit_width": 8}, "stride"),
        ({"x": make_activations(17, 352), "bit_width": 8}, "17 tokens"),
        ({"x": x[:0], "bit_width": 8}, "0 tokens"),
        ({"x": x.to("meta"), "bit_width": 8}, "meta"),
        ({"x": x, "bit_width": 8, "out": poisoned(3, 17)}, "3 rows"),
        ({"x": x, "bit_width": 8, "out": poisoned(2, 34)[:, ::2]}, "stride"),
        ({"x": x, "bit_width": 8, "out": poisoned(2, 17).half()}, "float16"),
    ]
    for arguments, text in mistakes:
        with pytest.raises(ValueError, match=text):
            gemv(**arguments)
    address = unaligned.data_ptr()
    misplaced = torch.frombuffer((ctypes.c_char * (4 * 352)).from_address(address), dtype=torch.float32).view(1, 352)
    with pytest.raises(ValueError, match="aligned"):
        gemv(misplaced, bit_width=8)


@needs_library
def test_bad_weights_and_options_are_value_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(16, 128, 64)
    transposed = weight.planes.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="strides"):
        NativeGemv(NestedWeight(transposed, weight.scale, weight.offset, STORED_WIDTHS, 64, 128))
    overlapping = weight.planes[:1].expand(8, -1, -1)
    with pytest.raises(ValueError, match="strides"):
        NativeGemv(NestedWeight(overlapping, weight.scale, weight.offset, STORED_WIDTHS, 64, 128))
    with pytest.raises(ValueError, match="num_threads=0"):
        NativeGemv(weight, num_threads=0)
    with pytest.raises(ValueError, match="mode='int4'"):
        NativeGemv(weight, mode="int4")  # type: ignore[arg-type]
    monkeypatch.setenv("FQ_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="FQ_CPU_ISA=mmx"):
        NativeGemv(weight)


@each_isa
def test_environment_forces_the_isa(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQ_CPU_ISA", isa)
    assert NativeGemv(make_weight(1, 64, 64)).isa == isa


@pytest.fixture
def bare_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources without the library that an installation may have put beside them."""
    directory = tmp_path / "native"
    shutil.copytree(native_build.SOURCE_DIR, directory, ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(native_build, "SOURCE_DIR", directory)
    return directory


@pytest.mark.usefixtures("bare_sources")
def test_without_a_compiler_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.load_library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
            assert native.load_library() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.load_library() is None
            assert native.supported_isas() == ()
        with pytest.raises(RuntimeError, match="reference"):
            NativeGemv(make_weight(1, 64, 64))
    finally:
        native.load_library.cache_clear()


def fake_compiler(command: list[str]) -> str | None:
    """Works unless it is called `false`."""
    if command[0] == "false":
        return "false failed"
    Path(command[-1]).write_bytes(b"library")
    return None


@pytest.mark.usefixtures("bare_sources")
def test_build_is_cached_and_tries_the_next_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing compiler is passed over; a second build finds the first one's file; nothing else is left behind."""
    attempts = []

    def compiler(command: list[str]) -> str | None:
        attempts.append(command[0])
        return fake_compiler(command)

    monkeypatch.setattr(native_build, "_compilers", lambda: [["false", "--option"], ["g++"]])
    monkeypatch.setattr(native_build, "_run_compiler", compiler)
    library = native_build.build_library(tmp_path / "cache")
    assert native_build.build_library(tmp_path / "cache") == library
    assert list(dict.fromkeys(attempts)) == ["false", "g++"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [library.name]


def test_compilers_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else name)
    monkeypatch.setenv("CXX", "ccache c++")
    assert native_build._compilers() == [["ccache", "c++"], ["clang++"]]


def test_installed_library_is_found_first(bare_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer once the sources have changed."""
    monkeypatch.setattr(native_build, "_compilers", lambda: [["g++"]])
    monkeypatch.setattr(native_build, "_run_compiler", fake_compiler)
    cached = native_build.build_library(tmp_path / "cache")
    assert cached.parent == tmp_path / "cache"
    installed = bare_sources / native_build.library_name()
    native_build.compile_library(installed)
    assert native_build.build_library(tmp_path / "cache") == installed
    (bare_sources / "api.cpp").write_text("// changed\n")
    rebuilt = native_build.build_library(tmp_path / "cache")
    assert rebuilt.parent == tmp_path / "cache"
    assert rebuilt != cached


@pytest.mark.usefixtures("bare_sources")
def test_failed_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "_compilers", lambda: [["g++"]])
    monkeypatch.setattr(native_build, "_run_compiler", lambda command: "g++ failed: error: no")
    with pytest.raises(native_build.BuildError, match="g\\+\\+ failed: error: no"):
        native_build.build_library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
