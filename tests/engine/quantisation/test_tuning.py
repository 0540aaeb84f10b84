"""Tuned scales: gradients against float64, what is kept, what an interruption costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flexquant_rl.engine.checkpoint import load_checkpoint, load_model, save_checkpoint
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import DenseCache, NestedLinear, WidthPlan, reading
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation import tuned_linear, tuning
from flexquant_rl.engine.quantisation.calibration import Calibration
from flexquant_rl.engine.quantisation.config import QuantizationConfig, TuningConfig
from flexquant_rl.engine.quantisation.quantize import quantize_rtn
from flexquant_rl.engine.quantisation.tuned_linear import TunedLinear, tunable
from flexquant_rl.engine.quantisation.tuning import default_learning_rate, default_steps, tune_pairs

CONFIG = TuningConfig(6, learning_rate=0.02, evaluations=3)
TOO_LARGE = 0.5


Fresh = Callable[[], NestedCausalLM]


@pytest.fixture
def fresh(tiny_model_dir: Path) -> Fresh:
    """Makes the tiny Llama at groups of 32, to be changed; its FFN of 172 ends in a short group."""
    return lambda: load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


@pytest.fixture
def model(fresh: Fresh) -> NestedCausalLM:
    return fresh()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(97, 123, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return torch.randint(97, 123, (4, 24), generator=torch.Generator().manual_seed(2))


def stored(model: NestedCausalLM) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {n: (x.planes.clone(), x.scale.clone(), x.offset.clone()) for n, x in model.nested_linears().items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))


def make_linear(outputs: int, inputs: int, group_size: int, seed: int, device: torch.device) -> TunedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.1
    bias = torch.randn(outputs, generator=generator)
    nested = NestedLinear(
        quantize_rtn(weight, group_size=group_size),
        bias,
        unit_idx=0,
        cache=DenseCache(1 << 20),
        reference_weight=weight,
    ).to(device)
    linear = TunedLinear(nested, (3, 5, 8))
    for width in (3, 5, 8):
        steps = linear.steps(width)
        steps.data += 0.3 * torch.randn(steps.shape, generator=generator).to(device)
    return linear


def call(linear: TunedLinear, x: Tensor, width: int) -> Tensor:
    with reading(WidthPlan(torch.full((len(x), 1), width), None, collect=0)):
        out: Tensor = linear(x)
    return out


def dense(linear: TunedLinear, width: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in float64 by the documented formula, and the scale and offset that they depend on."""
    pairs = linear.by_width[str(width)]
    scale, offset = (part.detach().double().requires_grad_() for part in pairs.pairs())
    group = torch.arange(linear.num_inputs) // group_size
    codes = (linear._codes >> (8 - width)).double()
    return scale[:, group] * codes + offset[:, group], scale, offset


@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 150),
    group_size=st.sampled_from([32, 64, 128]),
    width=st.sampled_from([3, 5, 8]),
    seed=st.integers(0, 2**31),
)
def test_product_and_gradients(outputs: int, inputs: int, group_size: int, width: int, seed: int) -> None:
    linear = make_linear(outputs, inputs, group_size, seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(7, inputs, generator=generator).requires_grad_()
    weighting = torch.randn(7, outputs, generator=generator)
    (call(linear, x, width) * weighting).sum().backward()

    weight, scale, offset = dense(linear, width, group_size)
    exact_x = x.detach().double().requires_grad_()
    out = exact_x @ weight.T + linear.bias.double()
    (out * weighting).sum().backward()
    torch.testing.assert_close(call(linear, x, width).double(), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    # The steps enter scale and offset linearly: their gradients follow from those of the pair.
    pairs = linear.by_width[str(width)]
    start, spread, mean = pairs._scale.double(), pairs._spread.double(), pairs._mean.double()
    expected = torch.stack([start * spread * (scale.grad - mean * offset.grad), start * offset.grad])
    torch.testing.assert_close(linear.steps(width).grad.double(), expected, rtol=1e-3, atol=2e-3)


def test_rows_in_blocks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    linear = make_linear(37, 96, 32, 0, device)
    x = torch.randn(5, 96, device=device)
    outputs, gradients = [], []
    for block in (1 << 20, 200):  # all rows at once, two at a time
        monkeypatch.setattr(tuned_linear, "_CPU_BLOCK", block)
        monkeypatch.setattr(tuned_linear, "_GPU_BLOCK", block)
        linear.zero_grad()
        outputs.append(call(linear, x, 3))
        outputs[-1].square().sum().backward()
        gradients.append(linear.steps(3).grad.clone())
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_bfloat16_where_it_is_fine_enough(device: torch.device) -> None:
    linear = make_linear(24, 64, 32, 0, device)
    x = torch.randn(5, 64, device=device)
    exact = {width: call(linear, x, width) for width in (3, 8)}
    linear.arithmetic = torch.bfloat16
    assert torch.equal(call(linear, x, 8), exact[8])
    rough = call(linear, x, 3)
    assert not torch.equal(rough, exact[3])
    torch.testing.assert_close(rough, exact[3], rtol=0.05, atol=0.05)
    rough.sum().backward()
    assert bool(linear.steps(3).grad.isfinite().all())


def test_unquantised_weights_at_width_0() -> None:
    linear = make_linear(24, 64, 32, 0, torch.device("cpu"))
    x = torch.randn(5, 64)
    torch.testing.assert_close(call(linear, x, 0), x @ linear._reference.T + linear.bias)


def test_pairs_that_did_not_move_are_stored_as_they_were(nested_model: NestedCausalLM) -> None:
    nested = nested_model.nested_linears()
    with tunable(nested_model, (3, 8)) as linears:
        assert not nested_model.nested_linears()
        for name, linear in linears.items():
            for width in (3, 8):
                scale, offset = linear.stored(width)
                index, used = nested[name].bit_widths.index(width), slice(scale.shape[1])
                assert torch.equal(scale, nested[name].scale[index, :, used])
                assert torch.equal(offset, nested[name].offset[index, :, used])
    assert nested_model.nested_linears() == nested


def test_stored_pairs_keep_the_mean_of_a_group() -> None:
    linear = make_linear(24, 64, 32, 3, torch.device("cpu"))
    pairs = linear.by_width["8"]
    scale, offset = (part.double() for part in pairs.stored())
    exact_scale, exact_offset = (part.double() for part in pairs.pairs())
    bias = (scale - exact_scale) * pairs._mean.double() + offset - exact_offset
    spacing = torch.finfo(torch.float16).eps * offset.abs()
    assert bool((bias.abs() <= spacing).all())


def test_steps_move_all_widths_alike() -> None:
    """A step of one cell's tenth moves a group's weights by a tenth of its own cell, at any width."""
    for width in (3, 5, 8):
        linear = make_linear(8, 64, 32, 0, torch.device("cpu"))
        pairs, steps = linear.by_width[str(width)], linear.steps(width)
        steps.data.zero_()
        before, _, _ = dense(linear, width, 32)
        for coordinate in (0, 1):
            steps.data.zero_()
            steps.data[coordinate] = 0.1
            after, _, _ = dense(linear, width, 32)
            moved = (after - before).view(8, 2, 32).square().mean(-1).sqrt() / pairs._scale
            torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-3, atol=1e-4)


def test_kl_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "LOGITS_AT_A_TIME", 40)  # of 31 tokens: one at a time
    logits = (torch.randn(6, 31) * 3).requires_grad_()
    reference = torch.randn(6, 31) * 3
    reference[2, 5] = -torch.inf  # ruled out
    loss = tuning._MeanKl.apply(logits, reference)
    (2 * loss).backward()
    exact = logits.detach().double().requires_grad_()
    wanted = reference.double().log_softmax(-1)
    terms = wanted.exp() * (wanted.masked_fill(wanted == -torch.inf, 0) - exact.log_softmax(-1))
    expected = terms.sum(-1).mean()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_tuning_lowers_the_kl_of_held_out_text(
    model: NestedCausalLM, windows: Tensor, held_out: Tensor, tmp_path: Path
) -> None:
    before, fingerprint = stored(model), model.fingerprint
    lines: list[str] = []
    seconds = tune_pairs(model, windows, held_out, CONFIG, report=lines.append)
    assert seconds > 0
    assert len(lines) == 3
    assert model.fingerprint != fingerprint
    facts = model.tuning
    assert facts is not None
    assert facts.steps == 6
    assert facts.num_tokens == windows.numel()
    assert facts.config["learning_rate"] == CONFIG.learning_rate
    assert facts.arithmetic in ("bfloat16", "float32")
    assert facts.held_out_sha256 == Calibration.of(held_out).sha256 != facts.sha256
    for width in ("3", "4", "5", "6"):
        assert facts.output_kl_after[width] < 0.97 * facts.output_kl_before[width]
    assert facts.output_kl_after["8"] <= facts.output_kl_before["8"]
    assert all(torch.equal(planes, before[name][0]) for name, (planes, _, _) in stored(model).items())
    # What is claimed is what a checkpoint gives, but for float32 sums in another order.
    save_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.tuning == facts
    assert loaded.fingerprint == model.fingerprint
    tokens = held_out[:, :-1]
    logits = {b: model.forward(tokens, torch.full((*tokens.shape, model.num_units), b), keep=23).logits for b in (0, 3)}
    wanted = logits[0].double().log_softmax(-1)
    kl = (wanted.exp() * (wanted - logits[3].double().log_softmax(-1))).sum(-1).mean()
    assert float(kl) == pytest.approx(facts.output_kl_after["3"], rel=5e-3)


def test_only_named_widths_change(model: NestedCausalLM, windows: Tensor, held_out: Tensor) -> None:
    before = stored(model)
    tune_pairs(model, windows, held_out, TuningConfig(3, learning_rate=0.02, widths=(4,)))
    for name, (_, scale, offset) in stored(model).items():
        for index, width in enumerate(model.bit_widths):
            kept = torch.equal(scale[index], before[name][1][index]) and torch.equal(
                offset[index], before[name][2][index]
            )
            assert kept == (width != 4)


def test_stops_early_and_keeps_what_was_best(model: NestedCausalLM, windows: Tensor, held_out: Tensor) -> None:
    before = stored(model)
    tune_pairs(model, windows, held_out, TuningConfig(40, learning_rate=50.0, evaluations=20))
    assert same(before, stored(model))
    assert model.tuning is not None
    assert model.tuning.steps == 6  # three evaluations without gain
    assert model.tuning.output_kl_after == model.tuning.output_kl_before


def test_a_rate_that_is_too_large_is_found_out(
    fresh: Fresh, windows: Tensor, held_out: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The width goes back to what was best and on with smaller steps, after an interruption too."""
    config = TuningConfig(24, learning_rate=TOO_LARGE, evaluations=12, widths=(3,))
    stubborn, wise, resumed = fresh(), fresh(), fresh()
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "_AFTER_FAILURE", 1.0)
        tune_pairs(stubborn, windows, held_out, config)
    assert stubborn.tuning is not None
    assert stubborn.tuning.output_kl_after == stubborn.tuning.output_kl_before
    tune_pairs(wise, windows, held_out, config)
    assert wise.tuning is not None
    assert wise.tuning.output_kl_after["3"] < 0.95 * wise.tuning.output_kl_before["3"]
    file, written = tmp_path / "state.safetensors", tuning.write_states

    def write_then_stop(*args: Any) -> None:
        written(*args)
        if args[3]["rate_shares"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "write_states", write_then_stop)
        with pytest.raises(KeyboardInterrupt):
            tune_pairs(resumed, windows, held_out, config, state_file=file)
    tune_pairs(resumed, windows, held_out, config, state_file=file)
    assert same(stored(resumed), stored(wise))


def test_same_seed_same_pairs(fresh: Fresh, windows: Tensor, held_out: Tensor) -> None:
    results = []
    for seed in (0, 0, 1):
        model = fresh()
        tune_pairs(model, windows, held_out, TuningConfig(4, learning_rate=0.02, widths=(3,), seed=seed))
        results.append(stored(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_each_width_is_tuned_by_itself(fresh: Fresh, windows: Tensor, held_out: Tensor) -> None:
    alone, together = fresh(), fresh()
    tune_pairs(alone, windows, held_out, TuningConfig(4, learning_rate=0.02, widths=(3,)))
    tune_pairs(together, windows, held_out, TuningConfig(4, learning_rate=0.02))
    for name, (_, scale, _) in stored(alone).items():
        assert torch.equal(scale[0], stored(together)[name][1][0])


def test_recomputed_layers_give_the_same(
    fresh: Fresh, windows: Tensor, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, recomputed = fresh(), fresh()
    layers: list[nn.Module] = []
    original = tuning._recomputed
    monkeypatch.setattr(tuning, "_KEPT_BYTES", 0)
    monkeypatch.setattr(tuning, "_recomputed", lambda layer: (layers.append(layer), original(layer))[1])
    long = windows.repeat(1, 5)[:, :120]  # activations outweigh the weights
    tune_pairs(recomputed, long, held_out, CONFIG)
    assert len(layers) == 2
    assert "forward" not in layers[0].__dict__
    monkeypatch.setattr(tuning, "_KEPT_BYTES", 1 << 40)
    tune_pairs(kept, long, held_out, CONFIG)
    assert same(stored(kept), stored(recomputed))


@pytest.fixture(scope="module")
def straight(tiny_model_dir: Path, windows: Tensor, held_out: Tensor) -> NestedCausalLM:
    """Tuned without an interruption. Read it only."""
    model = load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))
    tune_pairs(model, windows, held_out, CONFIG)
    return model


@pytest.mark.parametrize("written", [1, 2, 3])
def test_interrupted_tuning_goes_on(
    fresh: Fresh,
    straight: NestedCausalLM,
    windows: Tensor,
    held_out: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: int,
) -> None:
    resumed = fresh()
    file = tmp_path / "state.safetensors"
    count = 0
    write = tuning.write_states

    def write_then_stop(*args: Any) -> None:
        nonlocal count
        write(*args)
        count += 1
        if count == written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "write_states", write_then_stop)
        with pytest.raises(KeyboardInterrupt):
            tune_pairs(resumed, windows, held_out, CONFIG, state_file=file)
    assert same(stored(resumed), stored(fresh()))  # nothing half-tuned
    lines: list[str] = []
    tune_pairs(resumed, windows, held_out, CONFIG, state_file=file, report=lines.append)
    assert len(lines) == 3 - written
    assert same(stored(resumed), stored(straight))
    assert resumed.tuning == straight.tuning
    # Another run does not go on from it.
    other = fresh()
    tune_pairs(other, windows, held_out, TuningConfig(2, learning_rate=0.02), state_file=file, report=lines.append)
    assert other.tuning is not None
    assert other.tuning.steps == 2


@pytest.mark.parametrize(("steps", "expected"), [(112, [22, 45, 67, 90, 112]), (3, [1, 2, 3]), (1, [1])])
def test_evaluations_are_even_and_the_last_step_is_one(
    model: NestedCausalLM, windows: Tensor, held_out: Tensor, steps: int, expected: list[int]
) -> None:
    found = []
    with tunable(model, (3,)) as linears:
        run = tuning._Run(model, linears, (3,), windows, held_out, TuningConfig(steps))
        for run.progress.step in range(1, steps + 1):
            found += [run.progress.step] if run.is_evaluation() else []
    assert found == expected


def test_long_runs_say_how_far_they_are(
    model: NestedCausalLM, windows: Tensor, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_REPORT_EVERY_S", 0.0)
    lines: list[str] = []
    tune_pairs(model, windows, held_out, CONFIG, report=lines.append)
    assert ["held-out" in line for line in lines] == [False, True] * 3
    assert re.match(r"tuning: 1 of 6 steps, \d+ s, KL of the last window \d\.\d{4} at 3, .* at 8 bits$", lines[0])


def test_damaged_state(model: NestedCausalLM, windows: Tensor, held_out: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        tune_pairs(model, windows, held_out, CONFIG, state_file=file)


def test_gradient_that_is_not_finite(
    model: NestedCausalLM, windows: Tensor, held_out: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(model)
    last = list(model.nested_linears())[-1]

    def poisoned(self: Any, width: int, original: Callable[..., None] = tuning._Run._check_gradient) -> None:
        if width == 5 and self.progress.step == 1:
            self.linears[last].steps(5).grad[0, 3, 0] = float("nan")
        original(self, width)

    monkeypatch.setattr(tuning._Run, "_check_gradient", poisoned)
    with pytest.raises(InputError, match=rf"^{last}: 1 of \d+ gradients .* at 5 bits are NaN .* in step 2, but must"):
        tune_pairs(model, windows, held_out, CONFIG)
    assert same(before, stored(model))
    assert model.tuning is None


def test_a_gradient_is_named_where_it_stops_being_finite(
    model: NestedCausalLM, windows: Tensor, held_out: Tensor
) -> None:
    """What comes before in the model has no finite gradients either."""
    names = list(model.nested_linears())
    broken = next(name for name in names if name.endswith("layers.0.mlp.down_proj"))
    assert 0 < names.index(broken) < len(names) - 1

    def arrives(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    handle = model.hf_model.get_submodule(broken.removesuffix(".down_proj")).register_forward_hook(arrives)
    with pytest.raises(InputError, match=rf"^{broken}: .* are NaN or infinite in step 1"):
        tune_pairs(model, windows, held_out, CONFIG)
    handle.remove()


def test_bad_windows(model: NestedCausalLM, windows: Tensor) -> None:
    with pytest.raises(InputError, match="at least one token"):
        tune_pairs(model, windows, windows[:0], CONFIG)
    with pytest.raises(InputError, match="the model knows 0 to 127"):
        tune_pairs(model, windows + 1000, windows, CONFIG)


def test_default_steps() -> None:
    counts = [default_steps(round(10**exponent)) for exponent in (5, 6, 7, 8, 8.5, 9, 10, 11)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0


def test_default_learning_rate() -> None:
    rates = [default_learning_rate(round(10**exponent)) for exponent in (5, 7, 8, 8.5, 9, 11)]
    assert rates[:3] == [TuningConfig.learning_rate] * 3
    assert rates[2:] == sorted(set(rates), reverse=True)
    assert default_learning_rate(540_000_000) == pytest.approx(TuningConfig.learning_rate / 4)
