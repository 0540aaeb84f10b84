"""Latency tables: roofline arithmetic by hand, and a measured table that finds the truth behind noisy timings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from flexquant_rl.engine.control.cost import CostTable, clock_ms, measured_cost, roofline_cost
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig

WIDTHS = (3, 5, 8)
TABLE = CostTable(
    source="measured",
    fixed_ms=1.0,
    unit_ms=torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]], dtype=torch.float64),
    bit_widths=WIDTHS,
    fingerprint="f" * 64,
    device="cpu",
    num_threads=1,
    error_p50=0.01,
    error_p95=0.05,
)


def nested_bytes(num_outputs: int, num_padded_inputs: int, bit_width: int, group_size: int = 32) -> int:
    """Planes of one bit per input, and a float16 scale and offset per group."""
    return bit_width * num_outputs * num_padded_inputs // 8 + 2 * 2 * num_outputs * num_padded_inputs // group_size


class TestTable:
    def test_latency_is_fixed_plus_the_units(self) -> None:
        widths = torch.tensor([[3, 3], [3, 8], [8, 5]])
        assert TABLE.latency_ms(widths).tolist() == [1 + 1 + 2, 1 + 1 + 6, 1 + 3 + 4]
        assert TABLE.latency_ms(widths[None]).shape == (1, 3)
        assert TABLE.latency_ms(widths[1]).item() == 8
        assert TABLE.latency_ms(widths).dtype == torch.float64

    def test_shares_are_of_the_largest_width_everywhere(self) -> None:
        assert TABLE.full_width().tolist() == [8, 8]
        assert TABLE.time_share(TABLE.full_width()).item() == 1
        assert TABLE.time_share(torch.tensor([3, 3])).item() == 4 / 10
        assert replace(TABLE, controller_ms=0.5).controller_share == 0.5 / 10

    @settings(max_examples=30)
    @given(st.lists(st.sampled_from(WIDTHS), min_size=2, max_size=2), st.integers(0, 1))
    def test_narrower_is_never_slower(self, widths: list[int], unit: int) -> None:
        narrower = list(widths)
        narrower[unit] = WIDTHS[max(0, WIDTHS.index(widths[unit]) - 1)]
        assert TABLE.time_share(torch.tensor(narrower)) <= TABLE.time_share(torch.tensor(widths))

    @pytest.mark.parametrize("bit_width", [0, 2, 4, 9])
    def test_width_without_an_entry_is_refused(self, bit_width: int) -> None:
        with pytest.raises(InputError, match=f"bit-width {bit_width} has no latency; the table holds 3, 5, 8"):
            TABLE.latency_ms(torch.tensor([8, bit_width]))

    def test_json_form_keeps_everything(self) -> None:
        data = json.loads(json.dumps(TABLE.to_dict()))
        loaded = CostTable.from_dict(data)
        assert torch.equal(loaded.unit_ms, TABLE.unit_ms)
        assert loaded.unit_ms.dtype == torch.float64
        assert loaded.to_dict() == TABLE.to_dict()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("source", "guessed"),
            ("decoder", "fast"),
            ("num_threads", "2"),
            ("num_threads", 0),
            ("fixed_ms", "1"),
            ("fixed_ms", math.nan),
            ("fixed_ms", -1e6),
            ("error_p50", "0.1"),
            ("unit_ms", [1.0, 2.0]),
            ("unit_ms", [[1.0]]),
            ("unit_ms", [[math.nan] * 3] * 2),
        ],
    )
    def test_json_form_that_cannot_be_true(self, field: str, value: object) -> None:
        data = TABLE.to_dict()
        assert CostTable.from_dict(data).bit_widths == TABLE.bit_widths
        with pytest.raises(ValueError, match=r"in a latency table|expected sequence"):
            CostTable.from_dict({**data, field: value})


class TestRoofline:
    def test_units_read_planes_scales_and_offsets(self, nested_model: NestedCausalLM) -> None:
        table = roofline_cost(nested_model, bandwidth_gb_s=2.0)
        assert table.source == "roofline"
        assert table.bit_widths == (3, 4, 5, 6, 8)
        for column, bit_width in enumerate(table.bit_widths):
            attention = 2 * nested_bytes(64, 128, bit_width) + 2 * nested_bytes(32, 128, bit_width)
            mlp = 2 * nested_bytes(172, 128, bit_width) + nested_bytes(64, 256, bit_width)
            layer_ms = (attention + mlp) / 2e6
            head_ms = nested_bytes(128, 128, bit_width) / 2e6
            assert table.unit_ms[:, column].tolist() == pytest.approx([layer_ms, layer_ms, head_ms])
        assert table.fixed_ms == pytest.approx(5 * 64 * 4 / 2e6), "five norms of 64 in float32; no embedding"

    @pytest.mark.parametrize("quantize_head", [True, False])
    def test_fixed_part_holds_biases_norms_and_a_dense_head(
        self, tiny_tokenizer: PreTrainedTokenizerFast, quantize_head: bool
    ) -> None:
        config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        model = nest(GPT2LMHeadModel(config).eval(), tiny_tokenizer, QuantizationConfig(quantize_head=quantize_head))
        biases = 3 * 32 + 32 + 4 * 32 + 32
        norms = 3 * 2 * 32
        head = 0 if quantize_head else 128 * 32  # tied to the embedding, but read whole
        table = roofline_cost(model, bandwidth_gb_s=1.0)
        assert table.fixed_ms == pytest.approx((biases + norms + head) * 4 / 1e6)

    def test_shares_do_not_depend_on_the_bandwidth(self, nested_model: NestedCausalLM) -> None:
        widths = torch.tensor([3, 4, 8])
        slow, fast = (roofline_cost(nested_model, bandwidth_gb_s=value) for value in (1.0, 100.0))
        assert slow.time_share(widths).item() == pytest.approx(fast.time_share(widths).item())
        assert slow.time_share(slow.full_width()).item() == 1

    def test_table_belongs_to_the_model(self, nested_model: NestedCausalLM) -> None:
        roofline_cost(nested_model).check(nested_model)
        assert roofline_cost(nested_model).fingerprint == nested_model.fingerprint


class FakeClock:
    """Times steps by a known table, with noise, a slow drift and preempted steps."""

    def __init__(self, model: NestedCausalLM, *, noise: float, outliers: float, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        columns = torch.tensor(model.bit_widths, dtype=torch.float64)
        unit_ms = 0.1 * torch.rand(model.num_units, 1, dtype=torch.float64, generator=self.generator) * columns + 0.05
        self.truth = replace(roofline_cost(model), fixed_ms=2.0, unit_ms=unit_ms)
        self.noise, self.outliers = noise, outliers
        self.num_calls = 0

    def __call__(self, bit_widths: Tensor) -> float:
        self.num_calls += 1
        draw, normal = torch.rand((), generator=self.generator), torch.randn((), generator=self.generator)
        preempted = 5.0 if draw < self.outliers else 1.0
        return float(self.truth.latency_ms(bit_widths) * (1 + self.noise * normal) * preempted)


def relative_errors(table: CostTable, truth: CostTable) -> Tensor:
    """Errors of predicted latencies of random widths, some of them uniform."""
    generator = torch.Generator().manual_seed(1)
    widths = torch.tensor(truth.bit_widths)
    choices = torch.randint(len(widths), (200, len(truth.unit_ms)), generator=generator)
    choices[:5] = torch.arange(5)[:, None]
    return (table.latency_ms(widths[choices]) / truth.latency_ms(widths[choices]) - 1).abs()


class TestMeasured:
    def test_exact_timings_give_the_exact_table(self, half_unit_model: NestedCausalLM) -> None:
        clock = FakeClock(half_unit_model, noise=0.0, outliers=0.0)
        table = measured_cost(half_unit_model, clock)
        assert relative_errors(table, clock.truth).max() < 1e-4
        saved = table.unit_ms[:, -1:] - table.unit_ms
        torch.testing.assert_close(saved, clock.truth.unit_ms[:, -1:] - clock.truth.unit_ms, rtol=1e-3, atol=1e-4)
        assert table.error_p50 is not None
        assert table.error_p50 < 1e-4
        assert table.time_share(table.full_width()).item() == 1

    @pytest.mark.parametrize("seed", range(3))
    def test_noise_and_preempted_steps_are_seen_through(self, half_unit_model: NestedCausalLM, seed: int) -> None:
        clock = FakeClock(half_unit_model, noise=0.02, outliers=0.05, seed=seed)
        table = measured_cost(half_unit_model, clock, seed=seed)
        assert table.source == "measured"
        assert relative_errors(table, clock.truth).max() < 0.03
        assert table.error_p50 is not None
        assert table.error_p95 is not None
        assert table.error_p50 < 0.03
        assert table.error_p50 < table.error_p95

    def test_noise_gives_a_knapsack_nothing_to_choose_by(self, half_unit_model: NestedCausalLM) -> None:
        """A width saves 2% of a step in a whole unit and the clock errs by 10%: no entry may stand out by itself."""
        sizes = half_unit_model.unit_weights.double() / half_unit_model.unit_weights.double().mean()
        widths = torch.tensor(half_unit_model.bit_widths, dtype=torch.float64)
        clock = FakeClock(half_unit_model, noise=0.1, outliers=0.05)
        clock.truth = replace(clock.truth, fixed_ms=1.0, unit_ms=0.02 * sizes[:, None] * (widths - 8) / 5)
        table = measured_cost(half_unit_model, clock)
        assert relative_errors(table, clock.truth).max() < 0.05
        fastest = clock.truth.unit_ms.amin(1).sum()
        assert table.unit_ms.amin(1).sum() > 1.5 * fastest, "the sum of the most flattering entries flatters little"

    def test_reported_error_is_that_of_a_bad_clock(self, nested_model: NestedCausalLM) -> None:
        generator = torch.Generator().manual_seed(0)
        table = measured_cost(nested_model, lambda _: 1 + float(torch.rand((), generator=generator)))
        assert table.error_p50 is not None
        assert table.error_p50 > 0.05

    def test_many_units_get_more_steps(self, half_unit_model: NestedCausalLM) -> None:
        clock = FakeClock(half_unit_model, noise=0.0, outliers=0.0)
        measured_cost(half_unit_model, clock, num_steps=10)
        assert clock.num_calls >= 2 * half_unit_model.num_units * len(half_unit_model.bit_widths)
        clock.num_calls = 0
        measured_cost(half_unit_model, clock, num_steps=400)
        assert clock.num_calls == 400

    def test_every_step_is_at_stored_widths(self, nested_model: NestedCausalLM) -> None:
        seen: list[Tensor] = []

        def time_step(bit_widths: Tensor) -> float:
            seen.append(bit_widths)
            return 1.0

        measured_cost(nested_model, time_step)
        assert {int(width) for widths in seen for width in widths} == set(nested_model.bit_widths)
        uniform = [bool((widths == widths[0]).all()) for widths in seen]
        held_out = [index % 4 == 3 for index in range(len(seen))]
        for kind in (True, False):
            shares = [index for index, is_uniform in enumerate(uniform) if is_uniform == kind]
            assert {held_out[index] for index in shares} == {True, False}, "both kinds are fitted and held out"


class TestCheck:
    def table(self, model: NestedCausalLM, **changes: Any) -> CostTable:
        return replace(roofline_cost(model), **changes)

    def test_another_model(self, nested_model: NestedCausalLM, half_unit_model: NestedCausalLM) -> None:
        with pytest.raises(InputError, match=r"the profile is of model .{12}, but this one is .{12}; run `fq profile`"):
            roofline_cost(nested_model).check(half_unit_model)

    def test_another_device_decoder_or_thread_count(self, nested_model: NestedCausalLM) -> None:
        decoder, threads = default_decoder(nested_model)
        here = {"source": "measured", "decoder": decoder, "num_threads": threads}
        self.table(nested_model, **here).check(nested_model)
        for change, message in (
            ({"device": "cuda"}, f"measured on cuda with the {decoder} decoder and {threads} threads, but this is cpu"),
            (
                {"num_threads": threads + 1},
                f"and {threads + 1} threads, but this is cpu with {decoder} and {threads}; give --threads",
            ),
            ({"decoder": "other"}, f"with the other decoder and {threads} threads, but this is cpu with {decoder}"),
        ):
            with pytest.raises(InputError, match=message):
                self.table(nested_model, **(here | change)).check(nested_model)
        self.table(nested_model, num_threads=threads + 1).check(nested_model)  # a roofline knows no threads

    def test_threads_that_are_asked_for(self, nested_model: NestedCausalLM) -> None:
        table = measured_cost(nested_model, lambda _: 1.0, num_threads=3)
        assert (table.decoder, table.num_threads) == default_decoder(nested_model, 3)
        table.check(nested_model, 3)
        with pytest.raises(InputError, match="and 3 threads, but this is cpu with .* and 2; give --threads 3 or run"):
            table.check(nested_model, 2)


def test_clock_times_a_call() -> None:
    calls = []
    assert clock_ms(lambda: calls.append(1), torch.device("cpu")) >= 0
    assert calls == [1]


def test_a_roofline_does_not_depend_on_threads(nested_model: NestedCausalLM) -> None:
    before = torch.get_num_threads()
    tables = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            tables.append(roofline_cost(nested_model).to_dict())
    finally:
        torch.set_num_threads(before)
    assert tables[0] == tables[1]
    assert CostTable.from_dict(tables[0]).num_threads is None
