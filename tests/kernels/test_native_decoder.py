"""The native decode step against a float64 reference, for every instruction set this machine has."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexquant_rl.kernels import native
from flexquant_rl.kernels.bitplane import NestedWeight, pack_codes, padded_inputs
from flexquant_rl.kernels.native import Isa
from flexquant_rl.kernels.native_decoder import DecoderWeights, LayerWeights, LinearWeights, NativeDecoder
from flexquant_rl.kernels.reference import dequantize
from flexquant_rl.kernels.reference_decoder import decode_reference

STORED_WIDTHS = (3, 4, 5, 6, 8)
NUM_LAYERS = 3
NUM_UNITS = 2 * NUM_LAYERS + 1
VOCAB = 97
MAX_LENGTH = 45
ISAS = native.supported_isas()
# Float32 against float64 through three layers; a wrong index or a missing factor shows in the first digit.
RELATIVE_TOLERANCE = 5e-5

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.skipif(not ISAS, reason="no C++ compiler here, so no native kernels"),
]
each_isa = pytest.mark.parametrize("isa", ISAS)


class WeightSource:
    """Random weights of a chosen shape, group size 32."""

    def __init__(self, seed: int, *, bias: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.bias = bias

    def linear(self, num_outputs: int, num_inputs: int) -> LinearWeights:
        codes = torch.randint(0, 256, (num_outputs, num_inputs), dtype=torch.uint8, generator=self.generator)
        spread = torch.rand(num_outputs, padded_inputs(num_inputs) // 32, generator=self.generator) + 0.5
        spread *= 4 / num_inputs**0.5
        scale = torch.stack([spread * 2.0**-b for b in STORED_WIDTHS]).half()
        offset = torch.stack([-spread * (0.5 + 0.01 * i) for i in range(len(STORED_WIDTHS))]).half()
        nested = NestedWeight(pack_codes(codes), scale, offset, STORED_WIDTHS, 32, num_inputs)
        noise = 0.01 * torch.randn(num_outputs, num_inputs, generator=self.generator)
        dense = (dequantize(nested, bit_width=8) + noise).t().contiguous().t()
        return LinearWeights(nested, dense, self.vector(num_outputs) if self.bias else None)

    def vector(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def norm(self, size: int) -> Tensor:
        return 1 + 0.1 * self.vector(size)


def make_weights(
    *,
    hidden: int = 48,
    inner: int = 80,
    heads: int = 6,
    key_value_heads: int = 2,
    head_dim: int = 24,
    bias: bool = False,
    head_norms: bool = False,
    head_unit: int = NUM_UNITS - 1,
    seed: int = 0,
) -> DecoderWeights:
    source = WeightSource(seed, bias=bias)
    attention, cached = heads * head_dim, key_value_heads * head_dim
    layers = [
        LayerWeights(
            query=source.linear(attention, hidden),
            key=source.linear(cached, hidden),
            value=source.linear(cached, hidden),
            output=source.linear(hidden, attention),
            gate=source.linear(inner, hidden),
            up=source.linear(inner, hidden),
            down=source.linear(hidden, inner),
            attention_norm=source.norm(hidden),
            mlp_norm=source.norm(hidden),
            query_norm=source.norm(head_dim) if head_norms else None,
            key_norm=source.norm(head_dim) if head_norms else None,
            attention_unit=2 * index,
            mlp_unit=2 * index + 1,
        )
        for index in range(NUM_LAYERS)
    ]
    angles = torch.arange(MAX_LENGTH)[:, None] * 10_000 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return DecoderWeights(
        layers=layers,
        embedding=torch.randn(VOCAB, hidden, generator=source.generator),
        final_norm=source.norm(hidden),
        head=source.linear(VOCAB, hidden),
        head_unit=head_unit,
        cosine=angles.cos(),
        sine=angles.sin(),
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        norm_epsilon=1e-5,
        attention_scale=head_dim**-0.5,
        num_units=NUM_UNITS,
    )


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def random_widths(seed: int = 0, *, reference: bool = True) -> Tensor:
    allowed = torch.tensor([*([0] if reference else []), *STORED_WIDTHS])
    return allowed[torch.randint(len(allowed), (NUM_UNITS,), generator=torch.Generator().manual_seed(seed))]


def read(decoder: NativeDecoder, tokens: Tensor, widths: Tensor, chunks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of every token and the statistics of every layer, reading `chunks` tokens at a time."""
    cache, position, results = decoder.new_cache(), 0, []
    for chunk in tokens.split(chunks):
        results.append(decoder(cache, chunk, position, widths, num_logits=len(chunk)))
        position += len(chunk)
    logits, residual_update, crest = (torch.cat(parts) for parts in zip(*results, strict=True))
    for statistic in (residual_update, crest):
        assert statistic.shape == (len(tokens), NUM_UNITS)
        assert not statistic[:, -1].any()  # the head
        assert torch.equal(statistic[:, 0:-1:2], statistic[:, 1::2])  # attention and MLP of one layer
    return logits, residual_update[:, 0:-1:2], crest[:, 0:-1:2]


def test_results_are_new_tensors() -> None:
    decoder, widths = NativeDecoder(make_weights()), random_widths()
    cache = decoder.new_cache()
    results = [decoder(cache, random_tokens(1, seed), 0, widths) for seed in range(40)]
    copies = [[tensor.clone() for tensor in result] for result in results]
    decoder(cache, random_tokens(1, 99), 0, widths)
    for result, copy in zip(results, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, copy, strict=True))
    addresses = {tensor.data_ptr() for result in results for tensor in result}
    assert len(addresses) == 3 * len(results)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


SHAPES = {
    "grouped": {},
    "bias": {"bias": True},
    "head-norms": {"head_norms": True, "head_dim": 40},
    "one-key-value-head": {"key_value_heads": 1, "head_dim": 8, "heads": 3},
    "wide-heads": {"heads": 2, "head_dim": 80, "hidden": 64, "inner": 172},
    "long-rows": {"hidden": 544, "inner": 600, "heads": 4, "key_value_heads": 4, "head_dim": 64},
}
# Just enough for a third thread at three bits.
THREE_THREADS = {"hidden": 288, "inner": 352, "heads": 4, "key_value_heads": 4, "head_dim": 64}


@each_isa
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_reference(isa: Isa, shape: dict[str, int]) -> None:
    weights = make_weights(**shape)  # type: ignore[arg-type]  # a dict of mixed options
    decoder = NativeDecoder(weights, mode="float32", isa=isa)
    tokens = random_tokens(MAX_LENGTH)
    for seed in range(3):
        widths = random_widths(seed)
        expected = decode_reference(weights, tokens, widths)
        actual = read(decoder, tokens, widths, [16, 16, 1, 1, 5, 6])
        for got, want in zip(actual, expected, strict=True):
            assert relative_error(got, want) < RELATIVE_TOLERANCE


def test_int8_activations_are_close() -> None:
    weights = make_weights(hidden=256, inner=352, heads=4, head_dim=64)
    tokens, widths = random_tokens(20), random_widths(reference=False)
    expected, *_ = decode_reference(weights, tokens, widths)
    by_isa = [read(NativeDecoder(weights, isa=isa), tokens, widths, [1] * 20)[0] for isa in ISAS]
    errors = (by_isa[0] - expected).norm(dim=-1) / expected.norm(dim=-1)
    # The median: random weights attend so sharply that rounding may turn a single token to another position.
    assert 1e-5 < float(errors.median()) < 1e-2
    assert all(relative_error(other, by_isa[0].double()) < 1e-3 for other in by_isa)


@pytest.mark.parametrize("mode", ["int8", "float32"])
@each_isa
def test_threads_and_chunks_change_no_bit(isa: Isa, mode: native.Mode) -> None:
    weights = make_weights(hidden=544, inner=600, heads=4, key_value_heads=4, head_dim=64)
    tokens, widths = random_tokens(33), random_widths()
    base = read(NativeDecoder(weights, mode=mode, isa=isa), tokens, widths, [1] * 33)
    for num_threads in (1, 2, 3):
        decoder = NativeDecoder(weights, mode=mode, isa=isa, num_threads=num_threads)
        again = read(decoder, tokens, widths, [16, 16, 1])
        assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))


@each_isa
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("bit_width", STORED_WIDTHS)
def test_a_pass_over_any_number_of_tokens_has_the_bits_of_single_steps(
    isa: Isa, num_threads: int, bit_width: int
) -> None:
    """Logits, statistics, keys and values; a pass begins at any place of a cache block."""
    weights = make_weights(hidden=288, inner=352, heads=4, key_value_heads=2, head_dim=64)
    widths = torch.full((NUM_UNITS,), bit_width)
    decoder = NativeDecoder(weights, isa=isa, num_threads=num_threads)
    tokens, cache = random_tokens(7 + 16, seed=bit_width), decoder.new_cache()
    steps, held = [], []
    for position, token in enumerate(tokens.split(1)):
        steps.append(decoder(cache, token, position, widths))
        held.append(cache.blocks.clone())
    for num_tokens in range(2, 17):
        twin, last = decoder.new_cache(), 7 + num_tokens
        decoder(twin, tokens[:7], 0, widths)
        outputs = decoder(twin, tokens[7:last], 7, widths, num_logits=num_tokens)
        for output, expected in zip(outputs, zip(*steps[7:last], strict=True), strict=True):
            assert torch.equal(output, torch.cat(expected)), f"M={num_tokens}"
        assert torch.equal(twin.blocks, held[last - 1]), f"M={num_tokens}"


def test_head_that_is_no_unit_is_read_unquantised() -> None:
    weights = make_weights(head_unit=-1)
    weights = replace(weights, head=LinearWeights(None, weights.head.dense))
    tokens, widths = random_tokens(9), random_widths(reference=False)
    expected, *_ = decode_reference(weights, tokens, widths)
    actual, *_ = read(NativeDecoder(weights, mode="float32"), tokens, widths, [9])
    assert relative_error(actual, expected) < RELATIVE_TOLERANCE


def test_a_copied_cache_is_independent() -> None:
    decoder = NativeDecoder(make_weights())
    widths, tokens = random_widths(), random_tokens(12)
    cache = decoder.new_cache()
    decoder(cache, tokens, 0, widths)
    twin = cache.copy(12)
    first = decoder(cache, tokens[:1], 12, widths)[0]
    decoder(twin, tokens[5:6], 12, widths)
    decoder(twin, tokens[6:7], 13, widths)
    assert torch.equal(decoder(cache, tokens[:1], 12, widths)[0], first)


def test_a_copy_holds_what_it_was_asked_for_and_no_more() -> None:
    decoder = NativeDecoder(make_weights())
    cache = decoder.new_cache()
    cache.blocks.fill_(1.0)
    for length, blocks in ((0, 0), (1, 1), (16, 1), (17, 2)):
        twin = cache.copy(length)
        assert bool((twin.blocks[:, :, :blocks] == 1).all())
        assert not twin.blocks[:, :, blocks:].any()


def test_results_of_the_last_tokens_only() -> None:
    decoder = NativeDecoder(make_weights())
    widths, tokens = random_widths(), random_tokens(7)
    every = decoder(decoder.new_cache(), tokens, 0, widths, num_logits=7)
    for count in (1, 2, 6):
        last = decoder(decoder.new_cache(), tokens, 0, widths, num_logits=count)
        assert all(torch.equal(some[-count:], few) for some, few in zip(every, last, strict=True))


@pytest.fixture(scope="module")
def fresh() -> random.Random:
    """Other inputs in every run, which the name of a failing run tells."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("mode", ["int8", "float32"])
@each_isa
def test_a_row_is_what_its_token_alone_gives(
    isa: Isa, mode: native.Mode, num_threads: int, fresh: random.Random
) -> None:
    """Bit for bit, logits and statistics, after any history, for any number of tokens, at every width."""
    shape = SHAPES[fresh.choice(list(SHAPES))] if num_threads == 1 else THREE_THREADS
    decoder = NativeDecoder(
        make_weights(**shape, seed=fresh.randrange(2**31)),  # type: ignore[arg-type]  # a dict of mixed options
        mode=mode,
        isa=isa,
        num_threads=num_threads,
    )
    alone = NativeDecoder(decoder.weights, mode=mode, isa=isa)
    for width in (*[[width] * NUM_UNITS for width in (0, *STORED_WIDTHS)], None):
        widths = random_widths(fresh.randrange(2**31)) if width is None else torch.tensor(width)
        held, count = fresh.randrange(MAX_LENGTH - 16), fresh.randint(1, 16)
        tokens = random_tokens(held + count, fresh.randrange(2**31))
        cache, twin = decoder.new_cache(), alone.new_cache()
        for index, part in enumerate(tokens[:held].split(native.MAX_TOKENS) if held else ()):
            for each, blocks in ((decoder, cache), (alone, twin)):
                each(blocks, part, native.MAX_TOKENS * index, widths)
        wanted = fresh.randint(1, count)
        rows = decoder(cache, tokens[held:], held, widths, num_logits=wanted)
        steps = [alone(twin, tokens[i : i + 1], i, widths) for i in range(held, held + count)]
        for got, parts in zip(rows, zip(*steps[-wanted:], strict=True), strict=True):
            assert got.shape[0] == wanted
            assert torch.equal(got, torch.cat(parts)), f"{shape}, {held} held, {count} tokens, {wanted} rows"
        assert torch.equal(cache.blocks, twin.blocks)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_share_a_decoder(num_threads: int, fresh: random.Random) -> None:
    """Four threads with caches of their own get what they get one after the other."""
    decoder = NativeDecoder(make_weights(**THREE_THREADS), num_threads=num_threads)  # type: ignore[arg-type]
    chunks = [[random_tokens(fresh.randint(1, 3), fresh.randrange(2**31)) for _ in range(12)] for _ in range(4)]
    widths = [[random_widths(fresh.randrange(2**31)) for _ in range(12)] for _ in range(4)]
    barrier = threading.Barrier(4)

    def generate(index: int, *, waits: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        cache, position, results = decoder.new_cache(), 0, []
        if waits:
            barrier.wait(timeout=60)
        for tokens, bit_widths in zip(chunks[index], widths[index], strict=True):
            results.append(decoder(cache, tokens, position, bit_widths, num_logits=len(tokens)))
            position += len(tokens)
            results.append(decoder(cache, tokens[:1], position - 1, bit_widths))  # as made ahead
        return results

    expected = [generate(index, waits=False) for index in range(4)]
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(lambda index: generate(index, waits=True), range(4)))
        for got, want in zip(actual, expected, strict=True):
            for some, others in zip(got, want, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
    addresses = [tensor.data_ptr() for results in actual for result in results for tensor in result]
    assert len(set(addresses)) == len(addresses)


def test_stale_cache_entries_behind_the_position_do_not_matter() -> None:
    decoder = NativeDecoder(make_weights())
    widths, tokens = random_widths(), random_tokens(9)
    cache = decoder.new_cache()
    clean = decoder(cache, tokens[:3], 0, widths)[0]
    decoder(cache, tokens[3:], 3, widths)
    assert torch.equal(decoder(cache, tokens[:3], 0, widths)[0], clean)


class TestRefusals:
    @pytest.mark.parametrize(
        ("tokens", "position", "widths", "num_logits"),
        [
            (torch.zeros(17, dtype=torch.int64), 0, [4] * NUM_UNITS, 1),
            (torch.zeros(0, dtype=torch.int64), 0, [4] * NUM_UNITS, 1),
            (torch.tensor([VOCAB]), 0, [4] * NUM_UNITS, 1),
            (torch.tensor([-1]), 0, [4] * NUM_UNITS, 1),
            (torch.tensor([0]), MAX_LENGTH, [4] * NUM_UNITS, 1),
            (torch.tensor([0]), -1, [4] * NUM_UNITS, 1),
            (torch.tensor([0]), 0, [7] * NUM_UNITS, 1),
            (torch.tensor([0]), 0, [9] * NUM_UNITS, 1),
            (torch.tensor([0]), 0, [-1] * NUM_UNITS, 1),
            (torch.tensor([0]), 0, [4] * (NUM_UNITS - 1), 1),
            (torch.tensor([0]), 0, [4] * NUM_UNITS, 2),
            (torch.tensor([0]), 0, [4] * NUM_UNITS, 0),
            (torch.tensor([0], dtype=torch.int32), 0, [4] * NUM_UNITS, 1),
        ],
    )
    def test_bad_calls(self, tokens: Tensor, position: int, widths: list[int], num_logits: int) -> None:
        decoder = NativeDecoder(make_weights())
        cache = decoder.new_cache()
        with pytest.raises(ValueError, match="at most 16 tokens|pass int64"):
            decoder(cache, tokens, position, torch.tensor(widths), num_logits=num_logits)
        assert not cache.blocks.any()

    def test_a_width_of_a_linear_without_nested_weights(self) -> None:
        weights = make_weights()
        weights = replace(weights, head=LinearWeights(None, weights.head.dense))
        decoder = NativeDecoder(weights)
        with pytest.raises(ValueError, match="stored widths only"):
            decoder(decoder.new_cache(), torch.tensor([1]), 0, torch.full((NUM_UNITS,), 4))

    def test_a_cache_of_another_decoder(self) -> None:
        decoder, other = NativeDecoder(make_weights()), NativeDecoder(make_weights(head_dim=32))
        with pytest.raises(ValueError, match="pass one of this decoder"):
            decoder(other.new_cache(), torch.tensor([1]), 0, torch.full((NUM_UNITS,), 4))

    def test_bad_shapes(self) -> None:
        weights = make_weights()
        with pytest.raises(ValueError, match="final_norm is"):
            NativeDecoder(replace(weights, final_norm=torch.ones(3)))
        with pytest.raises(ValueError, match="must be"):
            NativeDecoder(replace(weights, head=weights.layers[0].gate))
        with pytest.raises(ValueError, match="num_threads=0"):
            NativeDecoder(weights, num_threads=0)
        with pytest.raises(ValueError, match="multiple of"):
            NativeDecoder(replace(weights, num_key_value_heads=4))
