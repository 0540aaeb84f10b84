"""Tuned scales: the pairs of each width follow KL(reference || that width) of the whole model on calibration text.

Codes stay as they are, so the widths are tuned each by itself, side by side: one pass of the unquantised model serves
all of them. Adam steps in units of a group's cell (tuned_linear.py). The rate warms up and then falls to nothing. What
is kept of a width is what was best on held-out windows, as it is stored: the beginning too, where no step helped. A
width that is no better at an evaluation goes back to its best and on at a quarter of the rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexquant_rl.engine.control.output_kl import LOGITS_AT_A_TIME, ReferenceDistribution
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import json_sha256
from flexquant_rl.engine.linear import REFERENCE_WIDTH, WidthPlan, active_plan, logits_under, reading
from flexquant_rl.engine.model import NestedCausalLM, decoder_layers
from flexquant_rl.engine.quantisation.calibration import Calibration, check_windows, replaced_forwards
from flexquant_rl.engine.quantisation.config import Tuning, TuningConfig
from flexquant_rl.engine.quantisation.tuned_linear import TunedLinear, has_bfloat16, tunable
from flexquant_rl.engine.quantisation.tuning_state import WidthState, read_states, write_states

# Activations up to this are kept for the backward pass; more only where the weights take more themselves.
_KEPT_BYTES = 1 << 30
_SAVE_EVERY_S, _REPORT_EVERY_S = 60.0, 10.0
# Where much is wrong larger steps help: 3 bits are best at the whole rate, 4 at half of it (docs/weights.md).
_LARGE_STEP_WIDTH, _SMALL_STEP = 3, 0.5
# A rate that suits one model is too large for another: a width that gained nothing goes on at this share of it.
_AFTER_FAILURE = 0.25
# By default a step reads a window, and all steps of a width together work this often on a weight; within limits.
_DEFAULT_WEIGHT_STEPS, _FEWEST_STEPS, _MOST_STEPS = 1.5e10, 40, 200
# The highest rate of `TuningConfig` suits models up to this size; beyond it falls as they grow. At 135 M weights the
# whole rate gains most, at 0.5 B 4 bits gain nothing at it and 14% at a quarter (docs/weights.md).
_WHOLE_RATE_WEIGHTS = 1.35e8


def default_steps(num_weights: int) -> int:
    """Steps for a model of so many weights: fewer for larger ones, which lose less and take longer."""
    return min(max(round(_DEFAULT_WEIGHT_STEPS / num_weights), _FEWEST_STEPS), _MOST_STEPS)


def default_learning_rate(num_weights: int) -> float:
    """The highest rate for a model of so many weights, in cells of a group."""
    return TuningConfig.learning_rate * min(1.0, _WHOLE_RATE_WEIGHTS / num_weights)


class _MeanKl(torch.autograd.Function):
    """Mean KL(reference || other) over tokens; its gradient is made at once, block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        """`[T, vocab]` float32 each -> nats, a scalar."""
        num_tokens = len(logits)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits)
        num_rows = max(1, LOGITS_AT_A_TIME // logits.shape[1])
        for block, base, out in zip(*(one.split(num_rows) for one in (logits, reference, gradient)), strict=True):
            log_probs, wanted = block.log_softmax(-1), base.log_softmax(-1)
            probability = wanted.exp()
            # A token that the reference rules out adds nothing, whatever its logits are (0 * inf is NaN).
            terms = (probability * (wanted - log_probs)).where(probability > 0, 0.0)
            total += terms.sum(dtype=torch.float64)
            out.copy_(log_probs.exp_().sub_(probability).div_(num_tokens))
        ctx.save_for_backward(gradient)
        return (total / num_tokens).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


def tune_pairs(
    model: NestedCausalLM,
    windows: Tensor,
    held_out: Tensor,
    config: TuningConfig,
    *,
    state_file: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> float:
    """Tunes the scales and offsets of a model in place and records it in `model.tuning`.

    Args:
        model: A nested model with its unquantised weights. Nobody else may run it meanwhile.
        windows: `[n, T]` int64, token ids to tune on; taken in random order, again where there are fewer than needed.
        held_out: `[m, T]` int64, token ids that decide what is kept.
        config: Steps, rate and so on.
        state_file: Where to keep what an interrupted run continues from; None keeps nothing.
        report: Gets a line for each evaluation.

    Returns:
        Seconds that it took, those of earlier, interrupted runs with them.

    Raises:
        InputError: If windows are empty or hold unknown ids, or a gradient is not finite. The model is as before then.
    """
    for tokens in (windows, held_out):
        check_windows(model.hf_model, tokens)
    widths = config.widths or model.bit_widths
    layers = list(decoder_layers(model.hf_model))
    with tunable(model, widths) as linears, _recomputing(layers, linears, windows.shape[1] - 1):
        run = _Run(model, linears, widths, windows.to(model.device), held_out.to(model.device), config)
        key = run.key()
        run.resume(state_file, key)
        reported = time.monotonic()
        while not run.is_done():
            run.step()
            if run.is_evaluation():
                report(run.evaluate())
                reported = time.monotonic()
            elif time.monotonic() - reported > _REPORT_EVERY_S:
                report(run.status())
                reported = time.monotonic()
            run.save(state_file, key)
        pairs = run.best_pairs()
    model.set_pairs(pairs)
    model.tuning = run.facts()
    return run.progress.seconds


@dataclass
class _Progress:
    """How far a run is; KL in nats by width."""

    step: int = 0
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    rate_shares: dict[str, float] = field(default_factory=dict)


class _Run:
    """One tuning under way. Arguments as `tune_pairs`."""

    def __init__(
        self,
        model: NestedCausalLM,
        linears: dict[str, TunedLinear],
        widths: Sequence[int],
        windows: Tensor,
        held_out: Tensor,
        config: TuningConfig,
    ) -> None:
        self.model, self.linears, self.config = model, linears, config
        self._windows, self._held_out = windows, held_out
        self.progress = _Progress()
        self.states = {
            width: WidthState({name: linear.steps(width) for name, linear in linears.items()}) for width in widths
        }
        self._order = _order(len(windows), config)
        self._evaluated = {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
        self._arithmetic = torch.bfloat16 if has_bfloat16(model.device) else torch.float32
        self._latest: dict[str, float] = {}  # KL of the last step's windows, nats by width
        self._saved = time.monotonic()
        for linear in linears.values():
            linear.arithmetic = self._arithmetic

    def key(self) -> str:
        """Digest of all that the outcome depends on."""
        facts = [
            self.model.fingerprint,
            asdict(self.config),
            Calibration.of(self._windows).sha256,
            Calibration.of(self._held_out).sha256,
            str(self._arithmetic),
        ]
        return json_sha256(facts)

    def facts(self) -> Tuning:
        """What the checkpoint keeps of the run."""
        windows = Calibration.of(self._windows)
        return Tuning(
            self.progress.step,
            windows.num_tokens,
            windows.sha256,
            self.progress.before,
            self.progress.best,
            Calibration.of(self._held_out).sha256,
            str(self._arithmetic).removeprefix("torch."),
            asdict(self.config) | {"widths": list(self.config.widths)},  # as JSON gives it back
        )

    def is_done(self) -> bool:
        """Whether all steps were taken, or no width gains from more."""
        return self.progress.step >= self.config.steps or not self._active()

    def is_evaluation(self) -> bool:
        """Whether held-out text is read after the step just taken."""
        return self.progress.step in self._evaluated

    def _active(self) -> list[int]:
        failures = self.progress.failures
        return [width for width in self.states if failures.get(str(width), 0) < self.config.patience]

    def step(self) -> None:
        """One step of every width that still gains."""
        began = time.monotonic()
        if not self.progress.before:
            self.progress.before = self._held_out_kl(list(self.states))
            self.progress.best = dict(self.progress.before)
        index, active = self.progress.step, self._active()
        tokens = self._windows[self._order[index]]
        with torch.no_grad():
            reference = self._logits(tokens, REFERENCE_WIDTH)
        for width in active:
            loss: Tensor = _MeanKl.apply(self._logits(tokens, width), reference)  # type: ignore[no-untyped-call]
            loss.backward()
            self._latest[str(width)] = float(loss.detach())
        for width in active:
            self._check_gradient(width)
            rate = self.config.learning_rate * (1.0 if width <= _LARGE_STEP_WIDTH else _SMALL_STEP)
            rate *= self.progress.rate_shares.get(str(width), 1.0)
            self.states[width].step(rate * _rate(index, self.config.steps))
        self.progress.step += 1
        self.progress.seconds += time.monotonic() - began

    def evaluate(self) -> str:
        """Keeps what got better on held-out text, goes back where nothing did, and says how it stands."""
        began = time.monotonic()
        progress, active = self.progress, self._active()
        for name, kl in self._held_out_kl(active).items():
            if kl < progress.best[name]:
                progress.best[name], progress.failures[name] = kl, 0
                self.states[int(name)].keep()
            else:
                progress.failures[name] = progress.failures.get(name, 0) + 1
                progress.rate_shares[name] = _AFTER_FAILURE * progress.rate_shares.get(name, 1.0)
                self.states[int(name)].restore_best()
        progress.seconds += time.monotonic() - began
        return self._line("held-out KL", progress.best)

    def status(self) -> str:
        """How far it is, between evaluations."""
        return self._line("KL of the last window", self._latest)

    def _line(self, what: str, by_width: dict[str, float]) -> str:
        kls = ", ".join(f"{kl:.4f} at {name}" for name, kl in by_width.items())
        done = f"{self.progress.step} of {self.config.steps} steps, {self.progress.seconds:.0f} s"
        return f"tuning: {done}, {what} {kls} bits"

    def best_pairs(self) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
        """The pairs to store, by linear and width: the best that held-out text has seen."""
        for state in self.states.values():
            state.restore_best()
        return {name: {b: linear.stored(b) for b in self.states} for name, linear in self.linears.items()}

    def resume(self, file: Path | None, key: str) -> None:
        """Continues from a file, if it is of this very run."""
        if file is not None and file.is_file():
            progress = read_states(file, key, self.states)
            if progress is not None:
                self.progress = _Progress(**progress)

    def save(self, file: Path | None, key: str) -> None:
        """Writes how far it is, at evaluations and every minute."""
        if file is not None and (self.is_evaluation() or time.monotonic() - self._saved > _SAVE_EVERY_S):
            write_states(file, key, self.states, asdict(self.progress))
            self._saved = time.monotonic()

    def _logits(self, tokens: Tensor, width: int) -> Tensor:
        """Next-token logits at a width after every token of a window `[T]` but the last, `[T - 1, vocab]` float32."""
        num_tokens = len(tokens) - 1
        has_head = self.model.units[-1].kind == "head"
        plan = WidthPlan(
            torch.full((num_tokens, self.model.num_units - has_head), width),
            torch.full((num_tokens,), width) if has_head else None,
            collect=0,
        )
        return logits_under(plan, self.model.hf_model, tokens[None, :-1], keep=num_tokens)[0]

    @torch.no_grad()
    def _held_out_kl(self, widths: Sequence[int]) -> dict[str, float]:
        """Mean KL in nats by width on the held-out windows, with the pairs as they are to be stored, in float32."""
        totals = dict.fromkeys(map(str, widths), 0.0)
        with _as_stored(self.linears):
            for tokens in self._held_out:
                reference = ReferenceDistribution(self._logits(tokens, REFERENCE_WIDTH))
                for width in widths:
                    totals[str(width)] += float(reference.kl_nats(self._logits(tokens, width)).double().mean())
        return {name: total / len(self._held_out) for name, total in totals.items()}

    def _check_gradient(self, width: int) -> None:
        """Raises InputError naming the linear nearest the loss whose gradient is not finite: those before it follow."""
        if bool(torch.isfinite(self.states[width].gradient).all()):
            return
        for name, linear in reversed(self.linears.items()):
            gradient = linear.steps(width).grad
            assert gradient is not None, "a view of the gradient of its width"
            num_bad = int((~torch.isfinite(gradient)).sum())
            if num_bad:
                raise InputError(
                    f"{name}: {num_bad} of {gradient.numel()} gradients of its scales and offsets at {width} bits are "
                    f"NaN or infinite in step {self.progress.step + 1}, but must be finite; use other calibration text "
                    "or --tune-steps 0"
                )


def _order(num_windows: int, config: TuningConfig) -> Tensor:
    """Which window each step reads, `[steps]`: each once in random order, then again in another."""
    generator = torch.Generator().manual_seed(config.seed)
    rounds = [torch.randperm(num_windows, generator=generator) for _ in range(-(-config.steps // num_windows))]
    return torch.cat(rounds)[: config.steps]


def _rate(step: int, num_steps: int) -> float:
    """Share of the learning rate in a step: up over the first tenth, then down half a period of a cosine."""
    warm_up = max(1, num_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


@contextmanager
def _as_stored(linears: dict[str, TunedLinear]) -> Iterator[None]:
    """Inside the block the linears read their pairs as a checkpoint would hold them."""
    for linear in linears.values():
        linear.rounds = True
    try:
        yield
    finally:
        for linear in linears.values():
            linear.rounds = False


@contextmanager
def _recomputing(layers: Sequence[nn.Module], linears: dict[str, TunedLinear], num_tokens: int) -> Iterator[None]:
    """Inside the block layers run anew in the backward pass, where keeping their activations would take too much."""
    # A linear's input and output, and as much again for norms, rotations and gates.
    numbers = 2 * sum(linear.num_inputs + linear.num_outputs for linear in linears.values())
    weight_bytes = sum(linear.num_inputs * linear.num_outputs * 4 for linear in linears.values())
    if numbers * num_tokens * 4 <= max(_KEPT_BYTES, weight_bytes):
        yield
        return
    with replaced_forwards(layers, [_recomputed(layer) for layer in layers]):
        yield


def _recomputed(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        plan = active_plan()
        assert plan is not None, "layers run under a plan"

        def run(*inputs: Any) -> Any:
            with reading(plan):  # the backward pass comes later, on a GPU in a thread of its own
                return forward(*inputs, **kwargs)

        return checkpoint(run, *args, use_reentrant=False)

    return call
