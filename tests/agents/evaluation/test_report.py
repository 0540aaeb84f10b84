"""Rows, tables and pictures, on hand cases and on synthetic rows with a known answer."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_rows import evaluation, row, static_kl
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from flexquant_rl.agents.evaluation import figures
from flexquant_rl.agents.evaluation.comparison import families, seed_groups, steps_unlike_static
from flexquant_rl.agents.evaluation.figures import plot_bits, plot_pareto, visible_token
from flexquant_rl.agents.evaluation.learning_curve import plot_learning_curve
from flexquant_rl.agents.evaluation.method import method_sentences
from flexquant_rl.agents.evaluation.report import console_table, markdown_table, write_report
from flexquant_rl.agents.evaluation.rows import EvalRow, public_dict, read_rows, write_rows
from flexquant_rl.agents.policies.families import family_facts
from flexquant_rl.engine.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")  # a missing glyph or a failed layout is only a warning


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
            "policy family seed kl_weight time_budget mean_bit_width output_kl_nats output_kl_p99_nats perplexity "
            "top1_agreement differs_from_static time_share_modelled time_share_measured speedup_modelled "
            "speedup_measured"
        ).split()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ":1 is not JSON"),
        ("[]", "missing or unknown: differs_from_static, family"),
        ('{"policy": "x", "kl": 1}', ", kl, "),
    ],
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


# Groups


def test_only_training_seeds_are_averaged() -> None:
    rows = [row("ppo", 0.9 - s / 10, 0.1 * (s + 1), policy="ppo", seed=s, kl_weight=50.0) for s in range(3)]
    (group,) = seed_groups([replace(r, time_budget=None) for r in rows], "ppo")
    assert (group.num_seeds, group.mean("output_kl_nats"), group.mean("time_share_measured")) == (
        3,
        pytest.approx(0.2),
        None,
    )
    assert group.sd("output_kl_nats") == pytest.approx(0.1)
    oracles = [row("oracle", share, 0.1, policy="oracle") for share in (0.6, 0.8)]
    assert [g.mean("time_share_modelled") for g in seed_groups(oracles, "oracle")] == [0.8, 0.6]


def test_seeds_at_one_budget_are_a_group_whatever_their_dials() -> None:
    rows = [row("ppo", 0.7, 0.1, policy="ppo", seed=s, kl_weight=50.0 + s) for s in range(3)]
    rows.append(row("ppo", 0.6, 0.1, policy="ppo", seed=0, kl_weight=50.0))
    assert [(g.time_budget, g.num_seeds) for g in seed_groups(rows, "ppo")] == [(0.7, 3), (0.6, 1)]


def test_families_run_from_simple_to_bound() -> None:
    rows = [row(family, 1.5, 0.1) for family in ("oracle", "ppo", "zebra", "fixed", "zebra", "knapsack")]
    assert list(families(rows)) == ["fixed", "knapsack", "ppo", "zebra", "oracle"]


# Tables and the report


def table_cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, header first."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_markdown_table_has_one_row_for_each_policy_and_budget() -> None:
    versus = "KL against static in this time (%, 95% CI)"
    rows = [replace(r, time_share_measured=0.71) if r.family == "fixed" else r for r in evaluation(noise=0.0)]
    header, _, *lines = table_cells(markdown_table(rows))
    assert {len(line) for line in lines} == {len(header)}
    assert len(lines) == 4 * 3 + 4 + 1
    header[header.index(versus)] = f"{versus}, modelled"
    named = [dict(zip(header, line, strict=True)) for line in lines]
    assert [line["family"] for line in named if line["family"]] == [
        "**fixed**",
        "**random**",
        "**static**",
        "**ppo**",
        "**oracle**",
    ]
    fixed = next(line for line in named if line["policy"].startswith("fixed"))
    assert (fixed["time budget"], fixed["time share, measured"]) == ("0.8", "0.710")
    learned = [line for line in named if line["policy"] == "ppo (3 seeds)"]
    assert [line["time budget"] for line in learned] == ["0.8", "0.7", "0.6", "0.5"]
    assert all(line["time share, measured"] == "not measured" for line in learned)
    assert all("±" in line["time share, modelled"] for line in learned)
    assert all(line["steps unlike static in equal time (%)"].startswith("25.0") for line in learned)
    versus += ", modelled"
    assert [line[versus] for line in learned] == ["-10.0 (-10.0 to -10.0)"] * 4
    assert [line[versus] for line in named if line["policy"].startswith("static")] == [""] * 4
    reward = "reward per token at this dial (full-width steps)"
    dials = [300 * share + 1 for share in (0.8, 0.7, 0.6, 0.5)]  # the mean of the seeds'
    expected = [
        1 - share - dial * 0.9 * static_kl(share) for share, dial in zip((0.8, 0.7, 0.6, 0.5), dials, strict=True)
    ]
    assert [float(line[reward].split(" ± ")[0]) for line in learned] == pytest.approx(expected, abs=1e-4)
    assert {line[reward] for line in named if line not in learned} == {""}


def test_the_method_says_what_untrained_is() -> None:
    rows = evaluation()
    assert "untrained" not in " ".join(method_sentences(rows))
    rows += [row("untrained", 0.6, 0.02, policy="untrained", seed=0, kl_weight=3.0)]
    assert "before PPO, not one of random weights: it was cloned" in " ".join(method_sentences(rows))


def test_console_table_is_narrow_plain_text() -> None:
    rows = evaluation()
    rows.append(row("other", 0.5, 1.23e-7, policy="/some/long/path/of/an/exported/pölicy"))
    lines = console_table(rows).splitlines()
    assert max(map(len, lines)) <= 110
    assert len({len(line) for line in lines}) == 1
    assert console_table(rows).isascii()
    assert len(lines) == 2 + 4 * 4 + 2


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
        "found on validation text",
        "With 3 training seeds nothing is said about another training",
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
    rows = [*evaluation(), row("entropy", 0.7, 0.01), row("zebra", 0.8, 0.02), row("oracle", 0.6, 0.004)]
    plot_pareto(rows, tmp_path / "a.png", title="Output KL at equal time, $5 and $6", caption=LONG_CAPTION)
    assert picture(tmp_path / "a.png", 1200).shape[0] == 1050
    timed = [
        replace(r, time_share_measured=share, static_kl_nats_measured=r.static_kl_nats)
        for r in rows
        if (share := r.time_share_modelled) and r.family != "zebra"
    ]
    plot_pareto(timed, tmp_path / "a.png", title="by both clocks", caption=LONG_CAPTION)
    assert picture(tmp_path / "a.png", 1950).shape[0] == 1050
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_panels_that_share_percents_show_what_each_needs() -> None:
    """The clock's panel comes last and has no oracles: it must not cut those of the other one off."""
    axes = Figure().subplots(1, 2, sharey="row")
    figures._dress_ratios(axes[0], [(-27.0, 5.0), (-5.0, 60.0)])
    for one in axes:
        low, high = one.get_ylim()
        assert -40 < low < -27
        assert 60 < high < 80


@pytest.mark.parametrize(
    "rows",
    [
        [row("oracle", 0.7, 0.01)],
        [row("ppo", 0.7, 0.01, seed=0), row("fixed", 1.0, 0.0, policy="fixed:8")],
        [row("fixed", 1.0, 1e-9, policy="fixed:8"), row("fixed", 0.6, 3.0, policy="fixed:4")],
        [replace(row(f, 0.7, 0.01), sequence_documents=(0,) * 24) for f in ("static", "random")],
        [row("ppo", None, 0.01)],
        [],
    ],
    ids=["one point", "reference with no KL", "many decades", "one document", "no time", "nothing"],
)
def test_pareto_picture_of_little(tmp_path: Path, rows: list[EvalRow]) -> None:
    plot_pareto(rows, tmp_path / "a.png", title="t", caption="c")
    picture(tmp_path / "a.png", 1200)


def drafts_and_fixed() -> list[EvalRow]:
    """Both modes; by the clock the drafts are faster at the width that comes first by name."""
    rows = []
    for width, kl, share in ((8, 2e-4, 0.6), (6, 3e-3, 0.5), (5, 1e-2, 0.55)):
        rows.append(row("fixed", width / 8, kl, policy=f"fixed:{width}", time_budget=None, mean_bit_width=float(width)))
        own = {
            "static_kl_nats": None,
            "time_budget": None,
            "mean_bit_width": float(width),
            "speedup_measured": 1 / share,
        }
        name = f"draft:3,verify={width}"
        rows.append(row("draft", None, kl, policy=name, time_share_measured=share, **own))
    return rows


def test_both_modes_in_one_picture(tmp_path: Path) -> None:
    rows = drafts_and_fixed()
    timed = [replace(one, time_share_measured=one.time_share_measured or one.time_share_modelled) for one in rows]
    plot_pareto(timed, tmp_path / "a.png", title="t", caption=LONG_CAPTION)
    assert picture(tmp_path / "a.png", 1950).shape[0] == 1050
    plot_pareto([one for one in rows if one.family == "draft"], tmp_path / "a.png", title="t", caption="c")
    assert picture(tmp_path / "a.png", 1200).shape[0] == 840


def test_bars_stand_at_their_points_whichever_clock_orders_them() -> None:
    axes = Figure().subplots()
    rows = drafts_and_fixed()
    figures._draw_family(axes, rows, families(rows)["draft"], "measured", 3)
    (bars,) = (one for one in axes.collections if isinstance(one, LineCollection))
    found = {round(segment[0][0], 3): (segment[0][1], segment[1][1]) for segment in bars.get_segments()}
    for one in rows:
        if one.time_share_measured is not None:
            assert found[one.time_share_measured] == pytest.approx((one.output_kl_low, one.output_kl_high))
    (line,) = (one for one in axes.lines if one.get_linestyle() == "-")
    assert line.get_xdata().tolist() == [0.6, 0.5, 0.55], "along the verify width, not the time"


def test_bits_stand_beside_the_fastest_of_a_width() -> None:
    axes = Figure().subplots()
    rows = drafts_and_fixed()
    rows.append(replace(rows[1], policy="draft:4", time_share_measured=0.4))
    for name, family in families(rows).items():
        figures._label_widths(axes, rows, family, "measured" if name == "draft" else "modelled")
    found = [(text.get_text(), text.xy[0]) for text in axes.texts]
    assert found == [("8", 1.0), ("6", 0.75), ("5", 0.625), ("8", 0.4), ("6", 0.5), ("5", 0.55)]
    assert not figures._label_widths(axes, evaluation(), families(evaluation())["fixed"], "modelled")
    assert len(axes.texts) == 6, "what shares its time between widths has none"


def test_the_front_of_static_where_it_has_no_rows() -> None:
    rows = [row("fixed", share, 0.1, time_budget=None) for share in (0.5, 0.7)]
    rows.append(replace(rows[1], time_share_modelled=1.7))  # slower than its best allocation
    want = [[0.5, static_kl(0.5)], [0.7, static_kl(0.7)]]
    np.testing.assert_allclose(figures._static_front(rows, "modelled"), want)
    assert len(figures._static_front(rows, "measured")) == 0
    assert len(figures._static_front(evaluation(), "modelled")) == 0


def test_legends_name_no_long_paths() -> None:
    names = (
        "ppo:/a/long/path/to/runs/monday/policy",
        "ppo:run",
        "my_policies:Mine",
        "draft:/somewhere/quite/far/away/run",
    )
    labels = {name: family.label for name, family in family_facts(names).items()}
    assert labels["ppo:/a/long/path/to/runs/monday/policy"] == "ppo:monday/policy"
    assert labels["draft:/somewhere/quite/far/away/run"] == "draft:away/run"
    assert (labels["ppo:run"], labels["my_policies:Mine"]) == ("ppo:run", "my_policies:Mine")


def test_learning_curve_of_any_shape(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    long = {seed: [(1000 * i, float(generator.normal(0.01, 0.004))) for i in range(40)] for seed in range(6)}
    # One seed; a resumed one that was validated elsewhere; nothing but the clone, as good as static; far below static.
    others = [{3: long[0]}, {0: long[0], 1: long[1][::2]}, {0: [(0, 0.0)]}, {0: [(0, -3.0), (64, -0.1)]}]
    for index, curves in enumerate([long, *others]):
        plot_learning_curve(curves, tmp_path / "l.png", title=f"$curve {index}", caption=LONG_CAPTION)
        picture(tmp_path / "l.png", 1350)
    with pytest.raises(ValueError, match="at least one network of every seed"):
        plot_learning_curve({0: long[0], 1: []}, tmp_path / "l.png", title="t", caption="c")


def test_the_mean_stands_where_every_seed_was_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[float]]] = []
    plot = Axes.plot

    def spy(axes: Axes, *args: Any, **kwargs: Any) -> Any:
        drawn.append((list(np.ravel(args[0])), list(np.ravel(args[1]))))
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    curves = {4: [(0, 0.1), (8, 0.5), (16, 0.3)], 5: [(0, 0.3), (16, 0.1)]}
    plot_learning_curve(curves, tmp_path / "l.png", title="t", caption="c")
    assert drawn[-1] == ([0, 16], pytest.approx([0.2, 0.2]))
    assert ([8], [0.5]) in drawn, "what validation chose of seed 4"
    assert ([0], [0.3]) in drawn, "and of seed 5"


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
        subtitle="test sequence 3 of $8, dial 15.1 full-width steps per nat",
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


def test_how_often_a_family_is_unlike_static_in_words() -> None:
    rows = evaluation(seeds=1)
    rows += [row("ppo", 0.6, 0.01, policy="ppo", seed=1, differs_from_static=0.75)]
    words = steps_unlike_static([r for r in rows if r.time_budget in (0.5, 0.6)], "ppo")
    assert words == "steps of ppo whose widths are not those of static at the same time budget: 25% at 0.5, 50% at 0.6"
    assert steps_unlike_static(rows, "oracle") is None
    assert steps_unlike_static([], "ppo") is None
