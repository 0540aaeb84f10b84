"""Signals against hand arithmetic: what a policy sees is what the documentation says, row by row, within bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import (
    SIGNAL_LIMIT,
    SIGNAL_SCHEMA_VERSION,
    SignalSchema,
    SignalTracker,
    project_embedding,
)
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.kernels.signal_constants import NATS_SCALE, POSITION_SCALE

WIDTHS = (3, 5, 8)
NUM_UNITS, VOCAB_SIZE = 2, 6
SCHEMA = SignalSchema(NUM_UNITS, WIDTHS, num_embedding_dims=4)
SENSITIVITY = [[0.1, 0.01, 1e-9], [1.0, 0.5, 0.25]]
UNIT_MS = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
FIXED_MS = 1.0
DEPTHS = (0.0, 1.0)
EMBEDDING = torch.randn(VOCAB_SIZE, 5, generator=torch.Generator().manual_seed(3))


def make_tracker(num_rows: int = 1) -> SignalTracker:
    cost = CostTable("roofline", FIXED_MS, torch.tensor(UNIT_MS, dtype=torch.float64), WIDTHS, "f", "cpu", 1)
    profile = Profile(cost, torch.tensor(SENSITIVITY), WIDTHS, "f", 100, "unquantised")
    return SignalTracker(SCHEMA, profile, EMBEDDING, DEPTHS, num_rows)


def make_output(logits: Tensor, residual_update: float = 0.5, crest: float = 4.0) -> StepOutput:
    rows = len(logits)
    return StepOutput(logits, torch.full((rows, NUM_UNITS), residual_update), torch.full((rows, NUM_UNITS), crest))


def random_output(seed: int, rows: int) -> StepOutput:
    generator = torch.Generator().manual_seed(seed)
    return StepOutput(
        3 * torch.randn(rows, VOCAB_SIZE, generator=generator),
        torch.rand(rows, NUM_UNITS, generator=generator),
        1 + torch.rand(rows, NUM_UNITS, generator=generator),
    )


def reset(tracker: SignalTracker, output: StepOutput, token: int = 1, kl_weight: float = 10.0) -> None:
    rows = len(output.logits)
    tracker.reset(output, torch.full((rows,), token), torch.full((rows,), kl_weight), torch.arange(rows))


def update(
    tracker: SignalTracker, output: StepOutput, widths: list[int], token: int = 1, mean_width: float = 5.0
) -> None:
    rows = len(output.logits)
    tracker.update(
        output, torch.tensor(widths).expand(rows, -1), torch.full((rows,), token), torch.full((rows,), mean_width)
    )


def token_signals(tracker: SignalTracker, row: int = 0) -> dict[str, float]:
    values, _ = SCHEMA.split(tracker.signals())
    return dict(zip(SCHEMA.global_names, values[row].tolist(), strict=True))


def unit_signals(tracker: SignalTracker, unit: int, row: int = 0) -> dict[str, float]:
    _, values = SCHEMA.split(tracker.signals())
    return dict(zip(SCHEMA.unit_names, values[row, unit].tolist(), strict=True))


def probabilities(logits: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def entropy_nats(logits: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities(logits))


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0]
NEXT_LOGITS = [0.0, 3.0, 0.5, -0.5, 0.25, 1.0]


class TestSchema:
    def test_version_2_is_these_names_in_this_order(self) -> None:
        """A change here changes what saved policies read: raise SIGNAL_SCHEMA_VERSION with it."""
        assert SIGNAL_SCHEMA_VERSION == 2
        assert SCHEMA.global_names == (
            *("token_entropy", "token_entropy_ema", "perplexity_entropy", "top1_probability", "top_margin"),
            *("surprisal", "step_kl", "probe_kl", "tokens_since_probe", "mean_width_16", "position", "dial"),
            *("embedding_0", "embedding_1", "embedding_2", "embedding_3"),
        )
        assert SCHEMA.unit_names == (
            *("log_sensitivity_3", "log_sensitivity_5", "log_sensitivity_8"),
            *("time_saved_3", "time_saved_5", "time_saved_8"),
            *("residual_update", "crest", "last_width", "depth"),
        )

    def test_dimensions(self) -> None:
        assert (SCHEMA.num_global, SCHEMA.num_per_unit, SCHEMA.dim) == (16, 10, 36)
        assert SignalSchema(9, (3, 4, 5, 6, 8)).dim == 44 + 9 * 14
        tracker = make_tracker(3)
        reset(tracker, random_output(0, 3))
        assert tracker.signals().shape == (3, SCHEMA.dim)
        assert tracker.signals().dtype == torch.float32

    def test_split_and_index_agree_with_the_vector(self) -> None:
        vector = torch.arange(2 * SCHEMA.dim).view(2, SCHEMA.dim)
        token, unit = SCHEMA.split(vector)
        assert torch.equal(torch.cat([token, unit.flatten(1)], dim=1), vector)
        assert token[1, SCHEMA.index("dial")] == SCHEMA.dim + 11
        assert unit[0, 1, SCHEMA.index_in_unit("crest")] == 16 + 10 + 7

    def test_json_form_keeps_everything(self) -> None:
        data = SCHEMA.to_dict()
        assert data["version"] == SIGNAL_SCHEMA_VERSION
        assert SignalSchema.from_dict(data) == SCHEMA


class TestTokenSignals:
    def test_after_the_prompt(self) -> None:
        tracker = make_tracker()
        reset(tracker, make_output(torch.tensor([LOGITS])), token=3, kl_weight=100.0)
        entropy, p = entropy_nats(LOGITS), probabilities(LOGITS)
        expected = {
            "token_entropy": entropy / 4,
            "token_entropy_ema": entropy / 4,
            "perplexity_entropy": math.log(1 + math.exp(entropy)) / 4,
            "top1_probability": p[0],
            "top_margin": p[0] - p[1],
            "surprisal": -math.log(p[3]) / 4,
            "step_kl": -3.0,  # log10 of the floor 1e-6, halved
            "probe_kl": -3.0,
            "tokens_since_probe": 1.0,
            "mean_width_16": 1.0,
            "position": 0.0,
            "dial": 2.0,
        }
        assert {name: token_signals(tracker)[name] for name in expected} == pytest.approx(expected, abs=1e-6)

    def test_after_a_step(self) -> None:
        tracker = make_tracker()
        reset(tracker, make_output(torch.tensor([LOGITS])))
        update(tracker, make_output(torch.tensor([NEXT_LOGITS])), [3, 8], token=5, mean_width=4.5)
        before, p = probabilities(LOGITS), probabilities(NEXT_LOGITS)
        ema = 0.9 * entropy_nats(LOGITS) + 0.1 * entropy_nats(NEXT_LOGITS)
        step_kl = sum(now * math.log(now / past) for now, past in zip(p, before, strict=True))
        expected = {
            "token_entropy": entropy_nats(NEXT_LOGITS) / 4,
            "token_entropy_ema": ema / 4,
            "perplexity_entropy": math.log(1 + math.exp(ema)) / 4,
            "top1_probability": p[1],
            "top_margin": p[1] - p[5],
            "surprisal": -math.log(p[5]) / 4,
            "step_kl": math.log10(step_kl) / 2,
            "mean_width_16": (15 * 8 + 4.5) / 16 / 8,
            "position": math.log(2) / 4,
            "dial": 1.0,
        }
        assert {name: token_signals(tracker)[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    def test_mean_width_forgets_after_16_tokens(self) -> None:
        tracker = make_tracker()
        reset(tracker, random_output(0, 1))
        for step in range(20):
            update(tracker, random_output(step, 1), [3, 3], mean_width=float(step))
        assert token_signals(tracker)["mean_width_16"] == pytest.approx(sum(range(4, 20)) / 16 / 8)

    def test_probe(self) -> None:
        tracker = make_tracker()
        reset(tracker, random_output(0, 1))
        tracker.observe_probe(torch.tensor([0.01]), torch.tensor([0]))
        assert token_signals(tracker)["probe_kl"] == pytest.approx(-1.0)
        assert token_signals(tracker)["tokens_since_probe"] == 0.0
        for step in range(3):
            update(tracker, random_output(step, 1), [3, 3])
        assert token_signals(tracker)["probe_kl"] == pytest.approx(-1.0)
        assert token_signals(tracker)["tokens_since_probe"] == pytest.approx(math.log(4) / math.log(257))
        for step in range(260):
            update(tracker, random_output(step, 1), [3, 3])
        assert token_signals(tracker)["tokens_since_probe"] == 1.0

    def test_embedding_is_the_projection_of_the_token_to_be_read(self) -> None:
        tracker = make_tracker()
        projected = project_embedding(EMBEDDING, 4)
        reset(tracker, random_output(0, 1), token=4)
        embedding = [token_signals(tracker)[f"embedding_{index}"] for index in range(4)]
        assert embedding == pytest.approx(projected[4].tolist())
        update(tracker, random_output(1, 1), [3, 3], token=2)
        embedding = [token_signals(tracker)[f"embedding_{index}"] for index in range(4)]
        assert embedding == pytest.approx(projected[2].tolist())

    def test_projection_keeps_the_directions_in_which_embeddings_vary(self) -> None:
        """Against a decomposition in float64: hardly less of the variance than the best subspace of its size."""
        generator = torch.Generator().manual_seed(torch.seed() % 1000)
        deviations = 0.9 ** torch.arange(64, dtype=torch.float32)
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
        embedding = 3 + (torch.randn(2000, 64, generator=generator) * deviations) @ rotation
        basis = torch.linalg.qr(project_embedding(embedding, 12).double()).Q
        centred = (embedding - embedding.mean(0)).double()
        kept = (basis.T @ centred).square().sum()
        best = torch.linalg.svdvals(centred)[:12].square().sum()
        assert 0.97 * best < kept <= best * (1 + 1e-6)

    def test_projection_changes_little_where_embeddings_do(self) -> None:
        """As rounding differs between machines; eigenvectors of equal eigenvalues could turn by any angle."""
        embedding = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        moved = embedding + 1e-6 * torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(project_embedding(moved, 16), project_embedding(embedding, 16), atol=1e-3, rtol=0)

    def test_projection_of_short_embeddings_ends_with_zeros(self) -> None:
        projected = project_embedding(torch.randn(50, 3), 8)
        assert projected.shape == (50, 8)
        torch.testing.assert_close(projected[:, :3].std(0), torch.ones(3))
        assert not projected[:, 3:].any()

    def test_directions_in_which_nothing_varies_stay_empty(self) -> None:
        embedding = torch.randn(300, 5) @ torch.randn(5, 24)
        projected = project_embedding(embedding, 12)
        torch.testing.assert_close(projected[:, :5].std(0), torch.ones(5))
        assert projected[:, 5:].abs().max() < 0.05

    def test_projection_is_fixed_centred_and_of_unit_variance(self) -> None:
        embedding = 7 + torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        projected = project_embedding(embedding, 16)
        torch.manual_seed(99)
        assert torch.equal(project_embedding(embedding, 16), projected)
        torch.testing.assert_close(projected.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(projected.std(0), torch.ones(16))
        assert torch.isfinite(project_embedding(torch.ones(8, 4), 3)).all()


class TestUnitSignals:
    def test_static_ones_come_from_the_profile(self) -> None:
        tracker = make_tracker()
        reset(tracker, random_output(0, 1))
        full_ms = FIXED_MS + 3.0 + 6.0
        for unit in range(NUM_UNITS):
            values = unit_signals(tracker, unit)
            for column, bit_width in enumerate(WIDTHS):
                sensitivity = max(SENSITIVITY[unit][column], 1e-6)
                saved = (UNIT_MS[unit][-1] - UNIT_MS[unit][column]) / full_ms
                assert values[f"log_sensitivity_{bit_width}"] == pytest.approx(math.log10(sensitivity) / 2)
                assert values[f"time_saved_{bit_width}"] == pytest.approx(saved * NUM_UNITS)
            assert values["depth"] == DEPTHS[unit]

    def test_dynamic_ones_come_from_the_last_step(self) -> None:
        tracker = make_tracker()
        reset(tracker, make_output(torch.tensor([LOGITS]), residual_update=0.1, crest=10.0))
        assert unit_signals(tracker, 1)["residual_update"] == pytest.approx(-1.0)
        assert unit_signals(tracker, 1)["crest"] == pytest.approx(1.0)
        assert unit_signals(tracker, 1)["last_width"] == 1.0
        update(tracker, make_output(torch.tensor([LOGITS]), residual_update=0.0, crest=1.0), [5, 3])
        assert unit_signals(tracker, 0)["residual_update"] == pytest.approx(-6.0)
        assert unit_signals(tracker, 0)["crest"] == pytest.approx(0.0)
        assert unit_signals(tracker, 0)["last_width"] == pytest.approx(5 / 8)
        assert unit_signals(tracker, 1)["last_width"] == pytest.approx(3 / 8)

    def test_policies_can_read_back_what_they_may_remember(self) -> None:
        tracker = make_tracker(2)
        reset(tracker, make_output(torch.tensor([LOGITS, NEXT_LOGITS])))
        assert SCHEMA.is_first_step(tracker.signals()).tolist() == [True, True]
        assert SCHEMA.last_widths(tracker.signals()).tolist() == [[8, 8], [8, 8]]
        update(tracker, make_output(torch.tensor([NEXT_LOGITS, LOGITS])), [5, 3])
        tracker.reset(
            make_output(torch.tensor([LOGITS])), torch.tensor([0]), torch.tensor([1.0]), rows=torch.tensor([1])
        )
        assert SCHEMA.is_first_step(tracker.signals()).tolist() == [False, True]
        assert SCHEMA.last_widths(tracker.signals()).tolist() == [[5, 3], [8, 8]]
        entropies = [entropy_nats(NEXT_LOGITS), entropy_nats(LOGITS)]
        assert SCHEMA.token_entropy_nats(tracker.signals()).tolist() == pytest.approx(entropies, rel=1e-5)


def run_rows(rows: list[int], total: int = 3) -> Tensor:
    """Signals of some rows of a batch of `total` after five steps, followed in a tracker of their own."""
    picked = torch.tensor(rows)

    def pick(output: StepOutput) -> StepOutput:
        return StepOutput(output.logits[picked], output.residual_update[picked], output.crest[picked])

    tracker = make_tracker(len(rows))
    tokens = torch.arange(total)
    tracker.reset(pick(random_output(0, total)), tokens[picked], 10.0 ** tokens[picked], torch.arange(len(rows)))
    for step in range(1, 6):
        widths = torch.tensor(WIDTHS)[(tokens[:, None] + torch.arange(NUM_UNITS) + step) % 3]
        mean_width = widths.float().mean(1)
        tracker.update(
            pick(random_output(step, total)), widths[picked], (tokens[picked] + step) % VOCAB_SIZE, mean_width[picked]
        )
    return tracker.signals()


class TestIndependence:
    def test_rows_of_a_batch_equal_rows_alone(self) -> None:
        together = run_rows([0, 1, 2])
        for row in range(3):
            torch.testing.assert_close(run_rows([row])[0], together[row], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run_rows([2, 0]), together[[2, 0]], rtol=1e-6, atol=1e-6)

    def test_reset_of_some_rows(self) -> None:
        tracker = make_tracker(3)
        reset(tracker, random_output(0, 3))
        update(tracker, random_output(1, 3), [3, 5])
        tracker.observe_probe(torch.tensor([0.1, 0.2, 0.3]), torch.arange(3))
        before = tracker.signals()
        restart, fresh = random_output(7, 2), make_tracker(2)
        tracker.reset(restart, torch.tensor([2, 3]), torch.tensor([1.0, 5.0]), rows=torch.tensor([2, 0]))
        fresh.reset(restart, torch.tensor([2, 3]), torch.tensor([1.0, 5.0]), rows=torch.arange(2))
        after = tracker.signals()
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[[2, 0]], fresh.signals())

    def test_signals_are_a_snapshot(self) -> None:
        tracker = make_tracker()
        reset(tracker, random_output(0, 1))
        signals = tracker.signals()
        kept = signals.clone()
        update(tracker, random_output(1, 1), [3, 3])
        assert torch.equal(signals, kept)


EXTREMES = st.sampled_from([-math.inf, -3e38, -1e5, -100.0, 0.0, 100.0, 1e5, 3e38])
FINITE_ROWS = st.lists(EXTREMES, min_size=VOCAB_SIZE, max_size=VOCAB_SIZE).filter(lambda row: max(row) > -math.inf)


@settings(max_examples=40)
@given(
    first=FINITE_ROWS,
    second=FINITE_ROWS,
    statistic=st.sampled_from([0.0, 1e-30, 1.0, 1e30, math.inf]),
    kl_weight=st.sampled_from([0.0, 1e-20, 1.0, 1e20]),
    token=st.integers(0, VOCAB_SIZE - 1),
)
def test_signals_are_finite_and_bounded_whatever_the_model_says(
    first: list[float], second: list[float], statistic: float, kl_weight: float, token: int
) -> None:
    tracker = make_tracker()
    reset(tracker, make_output(torch.tensor([first]), statistic, statistic), token=token, kl_weight=kl_weight)
    for logits in (second, first):
        for signals in (tracker.signals(),):
            assert torch.isfinite(signals).all()
            assert signals.abs().max() <= SIGNAL_LIMIT
        update(tracker, make_output(torch.tensor([logits]), statistic, statistic), [3, 8], token=token)
    assert torch.isfinite(tracker.signals()).all()


def test_certain_distribution_has_no_entropy() -> None:
    tracker = make_tracker()
    reset(tracker, make_output(torch.tensor([[0.0] + [-math.inf] * (VOCAB_SIZE - 1)])), token=0)
    values: dict[str, Any] = token_signals(tracker)
    assert values["token_entropy"] == 0.0
    assert values["surprisal"] == 0.0
    assert values["top1_probability"] == values["top_margin"] == 1.0


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_what_is_rolled_back_had_never_been_seen(seed: int, data: st.DataObject) -> None:
    """Random updates of random rows, with marks and rollbacks between them, against one that saw what was kept."""
    rows = 3
    tracker, kept = make_tracker(rows), make_tracker(rows)
    first = random_output(seed, rows)
    for each in (tracker, kept):
        reset(each, first)
    for step in range(6):
        chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
        before = tracker.mark()
        for wasted in range(data.draw(st.integers(0, 3))):
            move(tracker, random_output(seed + 100 * step + wasted, rows), None)
        undone = torch.tensor(sorted(data.draw(st.permutations(range(rows)))))
        tracker.rollback(before, data.draw(st.sampled_from([None, undone])))
        output = random_output(seed + 1000 + step, len(chosen))
        for each in (tracker, kept):
            move(each, output, chosen)
        assert torch.equal(tracker.signals(), kept.signals())
        assert torch.equal(tracker.signals(chosen), kept.signals()[chosen])


def test_rows_are_rolled_back_one_by_one() -> None:
    tracker = make_tracker(2)
    reset(tracker, random_output(0, 2))
    before, mark = tracker.signals(), tracker.mark()
    move(tracker, random_output(1, 2), None)
    after = tracker.signals()
    tracker.rollback(mark, torch.tensor([1]))
    assert torch.equal(tracker.signals()[0], after[0])
    assert torch.equal(tracker.signals()[1], before[1])
    assert not torch.equal(after[1], before[1])


def move(tracker: SignalTracker, output: StepOutput, rows: Tensor | None) -> None:
    count = len(output.logits)
    widths = torch.full((count, NUM_UNITS), 3)
    tracker.update(output, widths, torch.full((count,), 2), torch.full((count,), 3.0), rows)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=20))
def test_signals_in_their_own_units(counts: list[int]) -> None:
    schema = SignalSchema(2, (4, 8))
    signals = torch.zeros(len(counts), schema.dim)
    signals[:, schema.index("position")] = torch.tensor(counts).float().log1p() / POSITION_SCALE
    nats = torch.arange(len(counts)).float()
    for name in ("token_entropy", "token_entropy_ema", "surprisal"):
        signals[:, schema.index(name)] = nats / NATS_SCALE
    assert schema.tokens_decoded(signals).tolist() == counts
    for read in (schema.token_entropy_nats, schema.entropy_ema_nats, schema.surprisal_nats):
        assert torch.equal(read(signals), nats)
