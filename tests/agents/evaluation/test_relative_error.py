"""Relative error: what it measures, which matrices it asks, and that a setting meets its budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.in_flight import for_any_rows, trace_in_flight
from flexquant_rl.agents.evaluation.relative_error import chooser, entry_linears, fitted, relative_errors, tuned
from flexquant_rl.agents.policies.relative_error import RelativeError, parse_in_flight
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig


@pytest.mark.parametrize("unit", ["layer", "half"])
def test_entries_read_what_enters_the_unit(tiny_model_dir: object, unit: str) -> None:
    model = load_model(str(tiny_model_dir), QuantizationConfig(group_size=32, unit=unit))  # type: ignore[arg-type]
    names = {linear: name.rpartition(".")[2] for name, linear in model.nested_linears().items()}
    found = [[names[linear] for linear in linears] for linears in entry_linears(model)]
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    layers = [attention] * 2 if unit == "layer" else [attention, mlp] * 2
    assert found == [*layers, ["lm_head"]]
    assert entry_linears(model) == entry_linears(model), "no hook is left behind"


def test_error_by_hand(tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = entry_linears(tiny_prepared.model)[0][:2]
    inputs = torch.randn(3, 2, linears[0].num_inputs, generator=torch.Generator().manual_seed(0))
    found = relative_errors(inputs, linears, 3, 6)
    low, high = (torch.cat([linear.dense(width) for linear in linears]).double() for width in (3, 6))
    products = inputs.double() @ high.T
    expected = ((inputs.double() @ low.T) - products).norm(dim=-1) / products.norm(dim=-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(relative_errors(7 * inputs, linears, 3, 6), found, rtol=1e-4, atol=0)


def test_a_setting_meets_its_budget_where_it_was_found(tiny_prepared: Prepared) -> None:
    windows, budgets = tiny_prepared.windows.validation, (0.2, 0.5, 0.7, 0.85)
    found = tuned(tiny_prepared, windows, budgets)
    assert set(found) == set(budgets[1:]), "the first is out of reach"
    entries = entry_linears(tiny_prepared.model)
    kl = []
    for budget, setting in found.items():
        trace = trace_in_flight(tiny_prepared, windows, for_any_rows(chooser(setting, entries)))
        assert 1 / trace.speedup == pytest.approx(budget, abs=0.01)
        assert bool(((trace.bit_widths == setting.low) | (trace.bit_widths == setting.high)).all())
        kl.append(float(trace.output_kl_nats.mean()))
    assert kl == sorted(kl, reverse=True)


def test_high_widths_are_for_large_errors(tiny_prepared: Prepared) -> None:
    (setting,) = tuned(tiny_prepared, tiny_prepared.windows.validation, [0.7]).values()
    entries = entry_linears(tiny_prepared.model)
    choose = chooser(setting, entries)
    for unit, (low, high) in enumerate(zip(setting.low.tolist(), setting.high.tolist(), strict=True)):
        inputs: Tensor = torch.randn(4, 5, entries[unit][0].num_inputs)
        chosen = choose(unit, inputs)
        assert chosen.shape == (4, 5)
        assert set(chosen.unique().tolist()) <= {low, high}
        if low < high:
            errors = relative_errors(inputs, entries[unit], low, high)
            assert torch.equal(chosen == high, errors > setting.thresholds[unit])


def test_a_tuned_setting_is_had_again_by_its_name(tiny_prepared: Prepared) -> None:
    windows = tiny_prepared.windows.validation
    (setting,) = tuned(tiny_prepared, windows, [0.7]).values()
    asked = parse_in_flight(setting.name)
    assert asked is not None
    again = fitted(tiny_prepared, windows, asked)
    assert again.name == setting.name
    for field in ("low", "high", "thresholds"):
        assert torch.equal(getattr(again, field), getattr(setting, field)), field


@pytest.mark.parametrize("share", [0.0, 0.25, 0.8])
def test_the_share_is_that_of_the_text_it_is_fitted_to(tiny_prepared: Prepared, share: float) -> None:
    windows = tiny_prepared.windows.validation
    setting = fitted(tiny_prepared, windows, RelativeError(share, low=4, high=6))
    chosen = for_any_rows(chooser(setting, entry_linears(tiny_prepared.model)))
    widths = trace_in_flight(tiny_prepared, windows, chosen).bit_widths
    assert float((widths == 6).double().mean()) == pytest.approx(share, abs=0.02)
    assert set(widths.unique().tolist()) <= {4, 6}


def test_what_is_no_policy_of_the_model(tiny_prepared: Prepared) -> None:
    for asked, message in (
        (RelativeError(0.5, low=4, high=7), "width 7 is not stored"),
        (RelativeError(0.5, low=2.5, high=4), "outside the stored widths"),
        (RelativeError(0.5, low=4.4, high=4.4001), "are the same allocation; choose means further apart"),
    ):
        with pytest.raises(InputError, match=message):
            fitted(tiny_prepared, tiny_prepared.windows.validation, asked)
