"""Rows, fronts, comparisons, tables and pictures, on hand cases and on synthetic rows with a known answer."""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from flexquant_rl.agents.evaluation.comparison import (
    Comparison,
    captured_headroom,
    compare_at_equal_speed,
    families,
    interpolated_kl,
    log_ratio_to_static,
    pareto_front,
    seed_groups,
)
from flexquant_rl.agents.evaluation.figures import plot_bits, plot_pareto, visible_token
from flexquant_rl.agents.evaluation.report import console_table, markdown_table, write_report
from flexquant_rl.agents.evaluation.rows import EvalRow, public_dict, read_rows, write_rows
from flexquant_rl.engine.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")  # a missing glyph or a failed layout is only a warning

NUM_SEQUENCES = 24
DIFFICULTY = np.random.default_rng(3).lognormal(0, 0.5, NUM_SEQUENCES)


def row(
    family: str, speedup: float | None, kl: float, *, policy: str = "", noise: float = 0.0, **changes: object
) -> EvalRow:
    """A row whose sequences are as hard as everyone's, with its own noise on top."""
    generator = np.random.default_rng(zlib.crc32(f"{family} {speedup} {kl} {changes}".encode()))
    sequences = kl * DIFFICULTY / DIFFICULTY.mean() * generator.lognormal(0, noise, NUM_SEQUENCES)
    mean = float(sequences.mean())
    values: dict[str, object] = {
        "policy": policy or f"{family}:{speedup}",
        "family": family,
        "seed": None,
        "kl_weight": None,
        "mean_bit_width": 4.5,
        "output_kl_nats": mean,
        "output_kl_low": 0.8 * mean,
        "output_kl_high": 1.3 * mean,
        "output_kl_p99_nats": 9 * mean,
        "perplexity": 2.13,
        "top1_agreement": 0.9512,
        "speedup_modelled": speedup,
        "speedup_measured": None,
        "num_sequences": NUM_SEQUENCES,
        "num_tokens": NUM_SEQUENCES * 100,
        "reference": "unquantised",
        "sequence_kl_nats": tuple(sequences.tolist()),
    }
    return EvalRow(**(values | changes))  # type: ignore[arg-type]


def static_kl(speedup: float) -> float:
    """A front whose KL is linear in the time of a token."""
    return 1e-3 * (1 + 60 * (1 - 1 / speedup))


def evaluation(*, factor: float = 0.9, noise: float = 0.02, seeds: int = 3) -> list[EvalRow]:
    """Fixed, knapsack, random, a learned policy with `factor` times the static KL, and an oracle with half."""
    rows = [row("knapsack", speed, static_kl(speed), policy=f"knapsack:{speed}") for speed in (1.2, 1.5, 1.8, 2.1)]
    rows += [row("fixed", s, 1.2 * static_kl(s), policy=f"fixed:{b}") for b, s in ((6, 1.25), (5, 1.45), (4, 1.7))]
    rows += [row("random", s, 2 * static_kl(s)) for s in (1.4, 1.9)]
    for seed in range(seeds):
        for dial, speed in ((300.0, 1.3), (100.0, 1.6), (2500.0, 1.25)):
            at = speed + 0.01 * seed
            kl = factor * static_kl(at)
            rows.append(row("ppo", at, kl, policy="ppo", noise=noise, seed=seed, kl_weight=dial))
    return [*rows, row("oracle", 1.5, 0.5 * static_kl(1.5), policy="oracle")]


# Rows


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = evaluation()
    write_rows(tmp_path / "eval.jsonl", rows)
    assert read_rows(tmp_path / "eval.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["eval.jsonl"]


def test_numbers_of_other_libraries_and_not_finite_ones_become_json(tmp_path: Path) -> None:
    odd = row("fixed", 1.5, 0.1, perplexity=math.inf, mean_bit_width=np.float32(4), seed=np.int64(3))
    public = json.loads(json.dumps(public_dict(odd), allow_nan=False))
    assert (public["perplexity"], public["mean_bit_width"], public["seed"]) == (None, 4.0, 3)
    write_rows(tmp_path / "eval.jsonl", [odd])
    (back,) = read_rows(tmp_path / "eval.jsonl")
    assert math.isnan(back.perplexity)
    assert back.speedup_measured is None


def test_public_dict_has_the_fields_of_the_contract() -> None:
    assert (
        list(public_dict(evaluation()[0]))
        == (
            "policy seed kl_weight mean_bit_width output_kl_nats output_kl_p99_nats perplexity top1_agreement "
            "speedup_modelled speedup_measured"
        ).split()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", ":1 is not JSON"), ("[]", "missing or unknown: family"), ('{"policy": "x", "kl": 1}', ", kl, ")],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give an eval.jsonl"):
        read_rows(tmp_path / "eval.jsonl")


# Fronts


def test_front_keeps_what_nothing_beats() -> None:
    rows = [row("a", s, k) for s, k in ((1.0, 0.1), (1.5, 0.2), (1.4, 0.3), (2.0, 0.4), (2.0, 0.5), (0.9, 0.1))]
    rows += [row("a", None, 0.01), row("a", 3.0, 0.0), row("a", 3.0, math.nan)]
    assert [(r.speedup_modelled, pytest.approx(r.output_kl_nats)) for r in pareto_front(rows)] == [
        (1.0, 0.1),
        (1.5, 0.2),
        (2.0, 0.4),
    ]


@given(st.lists(st.tuples(st.floats(1, 3), st.floats(1e-6, 1)), max_size=12))
@settings(deadline=None, max_examples=60)
def test_front_rises_and_nothing_lies_below_it(points: list[tuple[float, float]]) -> None:
    rows = [replace(row("a", speed, 1.0), output_kl_nats=kl) for speed, kl in points]
    front = [(r.speedup_modelled or 0.0, r.output_kl_nats) for r in pareto_front(rows)]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(front))
    assert all(any(s >= speed and k <= kl for s, k in front) for speed, kl in points)
    for speed, kl in points:
        value = interpolated_kl(rows, speed)
        assert value is None or value <= kl * (1 + 1e-9)


def test_interpolation_is_time_sharing() -> None:
    rows = [row("a", 2.0, 0.16), row("a", 1.0, 0.01), row("a", 1.2, 0.5)]
    assert interpolated_kl(rows, 1.0) == pytest.approx(0.01)
    # Half of the sequences at each point take 3/4 of the time, and the mean KL; the point at 1.2 is dominated.
    assert interpolated_kl(rows, 4 / 3) == pytest.approx(0.085)
    assert interpolated_kl(rows, 2.0) == pytest.approx(0.16)


@pytest.mark.parametrize("speedup", [0.99, 2.01, math.nan])
def test_a_front_says_nothing_outside_its_range(speedup: float) -> None:
    assert interpolated_kl([row("a", 1.0, 0.01), row("a", 2.0, 0.16)], speedup) is None


def test_no_rows_no_front() -> None:
    assert interpolated_kl([], 1.0) is None
    assert interpolated_kl([row("a", None, 0.1)], 1.0) is None


@pytest.mark.parametrize(
    ("static", "policy", "oracle", "expected"),
    [(0.4, 0.3, 0.2, 0.5), (0.4, 0.4, 0.2, 0.0), (0.4, 0.5, 0.2, -0.5), (0.4, 0.3, 0.4, None), (None, 0.3, 0.2, None)],
)
def test_captured_headroom(static: float | None, policy: float, oracle: float, expected: float | None) -> None:
    assert captured_headroom(static, policy, oracle) == (expected if expected is None else pytest.approx(expected))


def test_only_training_seeds_are_averaged() -> None:
    rows = [row("ppo", 1.0 + s / 10, 0.1 * (s + 1), policy="ppo", seed=s, kl_weight=50.0) for s in range(3)]
    (group,) = seed_groups(rows, "ppo")
    assert (group.num_seeds, group.mean("output_kl_nats"), group.mean("speedup_measured")) == (
        3,
        pytest.approx(0.2),
        None,
    )
    assert group.sd("output_kl_nats") == pytest.approx(0.1)
    oracles = [row("oracle", speed, 0.1, policy="oracle") for speed in (1.6, 1.2)]
    assert [g.mean("speedup_modelled") for g in seed_groups(oracles, "oracle")] == [1.2, 1.6]


def test_families_run_from_simple_to_bound() -> None:
    rows = [row(family, 1.5, 0.1) for family in ("oracle", "ppo", "zebra", "fixed", "zebra", "knapsack")]
    assert list(families(rows)) == ["fixed", "knapsack", "ppo", "zebra", "oracle"]


# Comparisons


def compared(rows: list[EvalRow], a: str = "ppo", b: str = "knapsack") -> Comparison:
    """A comparison that must exist."""
    result = compare_at_equal_speed(rows, a, b)
    assert result is not None
    return result


def test_comparison_finds_a_known_ratio() -> None:
    result = compared(evaluation(factor=0.9, noise=0.02))
    assert math.exp(result.log_ratio) == pytest.approx(0.9, abs=0.01)
    assert result.log_ratio_low is not None
    assert result.log_ratio_high is not None
    assert result.log_ratio_low < result.log_ratio < result.log_ratio_high < 0
    assert (result.speedup_low, result.speedup_high) == (pytest.approx(1.27), pytest.approx(1.6))
    assert [seed for seed, _ in result.seed_log_ratios] == [0, 1, 2]
    assert np.mean([ratio for _, ratio in result.seed_log_ratios]) == pytest.approx(result.log_ratio)
    assert re.fullmatch(
        r"ppo has \d+\.\d% less output KL than knapsack at equal modelled speed "
        r"\(95% CI \d+\.\d-\d+\.\d%; 1\.27x to 1\.60x; 3 seeds: (\d+\.\d, ){2}\d+\.\d% less\)",
        result.sentence(),
    )


def test_pairing_removes_what_sequences_share() -> None:
    # Sequences differ by a factor of several, yet two fronts with one ratio everywhere leave nothing to doubt.
    result = compared(evaluation(factor=0.97, noise=0.0), "ppo", "knapsack")
    assert result.log_ratio == pytest.approx(math.log(0.97))
    assert result.log_ratio_low == pytest.approx(result.log_ratio_high)


def test_comparison_is_antisymmetric_and_repeatable() -> None:
    rows = evaluation(noise=0.1)
    forth, back = compared(rows), compared(rows, "knapsack", "ppo")
    assert back.log_ratio == pytest.approx(-forth.log_ratio)
    assert back.log_ratio_low == pytest.approx(-(forth.log_ratio_high or 0))
    assert forth == compared(rows)


def test_worse_is_said() -> None:
    result = compared(evaluation(factor=1.2))
    assert result.is_significant
    assert re.match(r"ppo does not beat knapsack: \d+\.\d% more output KL at equal modelled speed", result.sentence())


def test_a_tie_is_said() -> None:
    result = compared(evaluation(factor=1.0, noise=0.3, seeds=1))
    assert not result.is_significant
    assert re.match(
        r"no significant difference between ppo and knapsack at equal modelled speed: [\d.]+% (more|less) output KL "
        r"\(95% CI [\d.]+% less to [\d.]+% more; .*; 1 seed\)$",
        result.sentence(),
    )


def test_seeds_that_disagree_widen_the_interval() -> None:
    rows = [r for r in evaluation(noise=0.0) if r.family == "knapsack"]
    for seed, factor in enumerate((0.7, 0.8, 1.4)):
        rows += [row("ppo", s, factor * static_kl(s), policy="ppo", seed=seed) for s in (1.3, 1.6)]
    result = compared(rows)
    assert not result.is_significant
    assert result.sentence().endswith("3 seeds: 30.0% less, 20.0% less, 40.0% more)")


def test_equal_seeds_are_paired() -> None:
    rows = []
    for seed, level in enumerate((0.5, 1.0, 3.0)):
        for family, factor in (("ppo", 0.9), ("other", 1.0)):
            rows += [row(family, s, level * factor * static_kl(s), policy=family, seed=seed) for s in (1.3, 1.6)]
    result = compared(rows, "ppo", "other")
    assert result.is_significant
    assert [ratio for _, ratio in result.seed_log_ratios] == pytest.approx([math.log(0.9)] * 3)


def test_fronts_that_do_not_meet_are_not_compared() -> None:
    rows = [row("a", 1.0, 0.1), row("a", 1.2, 0.2), row("b", 1.3, 0.2), row("b", 1.6, 0.4)]
    assert compare_at_equal_speed(rows, "a", "b") is None
    assert compare_at_equal_speed(rows, "a", "missing") is None


def test_one_sequence_has_no_interval() -> None:
    rows = [replace(r, sequence_kl_nats=(r.output_kl_nats,)) for r in evaluation(noise=0.0)]
    result = compared(rows)
    assert (result.log_ratio_low, result.is_significant) == (None, False)
    assert "no interval from one test sequence" in result.sentence()


def test_rows_of_other_sequences_are_refused() -> None:
    rows = evaluation()
    rows[0] = replace(rows[0], sequence_kl_nats=rows[0].sequence_kl_nats[:-1])
    with pytest.raises(ValueError, match="same test sequences"):
        compare_at_equal_speed(rows, "ppo", "knapsack")


def test_sequences_without_any_kl_stay_finite() -> None:
    rows = [replace(r, sequence_kl_nats=(0.0,) * 23 + (1.0,)) for r in evaluation(noise=0.0)]
    result = compared(rows)
    assert math.isfinite(result.log_ratio_low or 0.0)


def test_ratio_to_the_static_front() -> None:
    rows = evaluation(factor=0.9, noise=0.0)
    group = seed_groups(rows, "ppo")[-1]
    assert log_ratio_to_static(group, rows) == pytest.approx([math.log(0.9)] * 3)
    # A fixed width that only the slower knapsack points do not beat must not worsen the baseline.
    at_fixed = [row("ppo", 1.7, static_kl(1.7), policy="ppo", seed=0)]
    assert log_ratio_to_static(seed_groups(at_fixed, "ppo")[0], rows) == pytest.approx([0.0] * 3, abs=1e-9)
    (outside,) = seed_groups([row("ppo", 5.0, 0.1, policy="ppo", seed=0)], "ppo")
    assert log_ratio_to_static(outside, rows) is None


# Tables and the report


def table_cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, header first."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_markdown_table_has_one_row_for_each_policy_and_dial() -> None:
    rows = [replace(r, speedup_measured=1.4) if r.policy == "fixed:4" else r for r in evaluation()]
    header, _, *lines = table_cells(markdown_table(rows))
    assert {len(line) for line in lines} == {len(header)}
    assert len(lines) == 4 + 3 + 2 + 3 + 1
    named = [dict(zip(header, line, strict=True)) for line in lines]
    assert [line["family"] for line in named if line["family"]] == [
        "**fixed**",
        "**random**",
        "**knapsack**",
        "**ppo**",
        "**oracle**",
    ]
    fixed = next(line for line in named if line["policy"] == "fixed:4")
    assert (fixed["speedup, modelled (x)"], fixed["speedup, measured (x)"]) == ("1.700", "1.400")
    learned = [line for line in named if line["policy"] == "ppo (3 seeds)"]
    assert [line["dial (speedup per nat)"] for line in learned] == ["2500", "300", "100"]
    assert all(line["speedup, measured (x)"] == "not measured" for line in learned)
    assert all("±" in line["output KL (nats)"] for line in learned)
    assert learned[-1]["best static at this modelled speed: KL (nats)"].endswith("(knapsack:1.5 to knapsack:1.8)")
    assert re.fullmatch(r"-\d+\.\d \(-\d+\.\d to -\d+\.\d\)", learned[-1]["KL against it (%, 95% CI)"])


def test_console_table_is_narrow_plain_text() -> None:
    rows = evaluation()
    rows.append(row("other", 2.0, 1.23e-7, policy="/some/long/path/of/an/exported/pölicy"))
    lines = console_table(rows).splitlines()
    assert max(map(len, lines)) <= 110
    assert len({len(line) for line in lines}) == 1
    assert console_table(rows).isascii()
    assert len(lines) == 2 + 14


def test_report_says_what_is_modelled_and_links_only_to_what_exists(tmp_path: Path) -> None:
    rows = evaluation()
    facts = {"model": "a|b", "profile source": "roofline", "env_steps": 200000, "training seeds": [0, 1, 2]}
    write_report(tmp_path, rows=rows, sentences=["ppo wins"], facts=facts, notes=["a note"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "- ppo wins",
        "a\\|b",
        "| env steps | 200,000 |",
        "0, 1, 2",
        "source: roofline",
        "No policy was timed",
    ):
        assert part in text
    assert "- a note" in text
    assert "unquantised" in text
    assert ".png" not in text
    assert "eval.jsonl" not in text

    write_rows(tmp_path / "eval.jsonl", rows)
    plot_pareto(rows, tmp_path / "pareto.png", title="t", caption="c")
    write_report(tmp_path, rows=rows, sentences=[], facts=facts)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert sorted(targets) == ["eval.jsonl", "pareto.png"]
    assert all((tmp_path / target).is_file() for target in targets)


# Pictures


def picture(path: Path, width: int) -> np.ndarray:
    """Reads a PNG, checks its width, and that the outermost pixels are background: nothing is cut."""
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] == width
    edge = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
    assert edge.min() == 1.0, "something touches the edge"
    assert (pixels.min(axis=-1) < 0.9).mean() > 0.01, "an empty picture"
    return pixels


LONG_CAPTION = "A model, its text, the machine and the seeds. " * 8


def test_pareto_picture_with_every_kind_of_family(tmp_path: Path) -> None:
    rows = [*evaluation(), row("entropy", 1.5, 0.01), row("zebra", 1.4, 0.02), row("oracle", 1.6, 0.004)]
    plot_pareto(rows, tmp_path / "a.png", title="Output KL at equal speed, $5 and $6", caption=LONG_CAPTION)
    assert picture(tmp_path / "a.png", 1200).shape[0] == 1050
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "rows",
    [
        [row("oracle", 1.5, 0.01)],
        [row("ppo", 1.5, 0.01, seed=0), row("fixed", 1.0, 0.0, policy="fixed:8")],
        [row("fixed", 1.0, 1e-9, policy="fixed:8"), row("fixed", 1.5, 3.0, policy="fixed:4")],
        [row("ppo", None, 0.01)],
        [],
    ],
    ids=["one point", "reference with no KL", "many decades", "no speed", "nothing"],
)
def test_pareto_picture_of_little(tmp_path: Path, rows: list[EvalRow]) -> None:
    plot_pareto(rows, tmp_path / "a.png", title="t", caption="c")
    picture(tmp_path / "a.png", 1200)


@pytest.mark.parametrize(("num_tokens", "num_units"), [(1, 1), (24, 3), (64, 9), (65, 9), (200, 80)])
def test_bits_picture_of_any_size(tmp_path: Path, num_tokens: int, num_units: int) -> None:
    generator = np.random.default_rng(0)
    kl = generator.lognormal(-5, 2, num_tokens)
    kl[num_tokens // 2 :: 7] = 0.0
    kl[num_tokens // 3 : num_tokens // 3 + 2] = np.nan
    words = ["def", " $x$", "\n", "        ", "日本", "", "\t\t", "_^\\", "\x00", " enumerate_all_of_them"]
    plot_bits(
        generator.choice([3, 4, 5, 6, 8], (num_tokens, num_units)),
        [words[index % len(words)] for index in range(num_tokens)],
        [*(f"layer.{index}" for index in range(num_units - 1)), "head"],
        tmp_path / "b.png",
        title="Bits read at every token",
        output_kl_nats=kl,
        bit_widths=(3, 4, 5, 6, 8),
    )
    picture(tmp_path / "b.png", 1650)


def test_bits_picture_refuses_what_does_not_fit(tmp_path: Path) -> None:
    widths = np.full((2, 1), 4)
    with pytest.raises(ValueError, match=r"\[T, U\] and \[T\]"):
        plot_bits(widths, ["a"], ["head"], tmp_path / "b.png", title="t", output_kl_nats=[1.0])
    with pytest.raises(ValueError, match=r"\[4\] are not stored"):
        plot_bits(
            widths, ["a", "b"], ["head"], tmp_path / "b.png", title="t", output_kl_nats=[1.0, 1.0], bit_widths=(3, 8)
        )


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "·the"),
        ("\n", "⏎"),
        ("\r\n", "⏎"),
        ("\t", "⇥"),
        ("   x", "···x"),
        ("\n        ", "⏎·\N{MULTIPLICATION SIGN}8"),
        ("", "∅"),
        ("a\x07b", "a□b"),
        ("日", "□"),
        ("abcdefghijk", "abcdefghi…"),
        ("abcdefghij", "abcdefghij"),
    ],
)
def test_tokens_are_visible(token: str, label: str) -> None:
    assert visible_token(token) == label
