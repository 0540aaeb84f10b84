"""Text read once at a static allocation, on which policies are tried without the model.

What a policy would decide is simulated on the recorded signals: its own widths, the position and the dial are as they
would be, what the model puts out is as it was at the recorded widths. That tells time shares to a few thousandths in a
hundredth of the time. Output KL is then the real one of the simulated widths, in one parallel pass.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.engine.control.controller import TorchController
from flexquant_rl.engine.control.cost import CostTable
from flexquant_rl.engine.control.decision import Decision, Policy, looks
from flexquant_rl.engine.control.output_kl import ReferenceDistribution, reference_width
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.decoding.next_token import Replay
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig

_REFERENCE_FLOATS = 1 << 27
"""Distributions of the reference that are kept: 512 MiB of logits, and as much of probabilities."""

_SMALLEST_KL_NATS = 1e-9


class RecordedText:
    """Signals of S sequences of T tokens, and what KL widths would have had on the first of them.

    Args:
        model: The model.
        profile: Profile that the signals are made with.
        windows: `[S, window_tokens]` int64.
        env: Shape of the episodes.
        cost: What the steps cost.
        num_scored: Sequences whose output KL is looked at, evenly spaced, as far as memory allows.
    """

    def __init__(
        self,
        model: NestedCausalLM,
        profile: Profile,
        windows: Tensor,
        env: EnvConfig,
        cost: CostTable,
        *,
        num_scored: int,
    ) -> None:
        self._model, self._cost, self._first = model, cost, env.prompt_tokens
        self._schema = SignalSchema(model.num_units, model.bit_widths)
        middle = model.bit_widths[len(model.bit_widths) // 2]
        dials, widths = torch.ones(len(windows)), torch.full((len(windows), model.num_units), middle)
        self._all_signals = signals_at(model, profile, windows, env, widths, dials)
        most = max(1, _REFERENCE_FLOATS // (env.max_new_tokens * model.vocab_size))
        count = min(num_scored, most, len(windows))
        self._scored = torch.linspace(0, len(windows) - 1, count).round().long()
        self._text = windows[self._scored, :-1]
        self._session = DecodeSession(model, max_length=env.window_tokens - 1)
        base = torch.full((model.num_units,), reference_width(model))
        self._reference = ReferenceDistribution(self._session.score(self._text, base, first=self._first))
        self._token_kl: dict[tuple[int, ...], Tensor] = {}

    @property
    def signals(self) -> Tensor:
        """`[S', T, dim]` of the sequences that are scored."""
        return self._all_signals[self._scored]

    def token_kl_nats(self, bit_widths: Tensor) -> Tensor:
        """Output KL of every token, `[S', T]`, had all been read at one allocation `[U]`."""
        key = tuple(bit_widths.tolist())
        if key not in self._token_kl:
            num_tokens = self._all_signals.shape[1]
            self._token_kl[key] = self._score(bit_widths.expand(len(self._text), num_tokens, -1))
        return self._token_kl[key]

    def time_share(self, one: Contestant) -> float:
        """Time of all steps, the controller's included, over that at the largest width everywhere, nearly."""
        widths = self._simulated(one.policy, one.kl_weight or 1.0)
        looking = self._cost.controller_share if looks(one.policy) else 0.0
        return float(self._cost.time_share(widths).mean()) + looking

    def output_kl_nats(self, one: Contestant) -> float:
        """Mean over the tokens that are scored, brought to the time share of all of them."""
        widths = self._simulated(one.policy, one.kl_weight or 1.0)
        return self._of_all(self._score(widths[self._scored]), widths)

    def rough_kl_nats(self, one: Contestant) -> float:
        """The same without a pass: a token has the KL of the fixed widths in its time, whatever came before it."""
        widths = self._simulated(one.policy, one.kl_weight or 1.0)
        fixed = [torch.full((self._model.num_units,), width) for width in self._model.bit_widths]
        times, order = self._cost.time_share(torch.stack(fixed)).double().sort()
        logs = torch.stack([self.token_kl_nats(fixed[index]) for index in order.tolist()]).double()
        logs = logs.clamp_min(_SMALLEST_KL_NATS).log()
        taken = self._cost.time_share(widths[self._scored]).double()
        above = torch.searchsorted(times, taken.contiguous()).clamp(1, len(fixed) - 1)
        part = ((taken - times[above - 1]) / (times[above] - times[above - 1])).clamp(0, 1)
        low, high = (logs.gather(0, index[None])[0] for index in (above - 1, above))
        return self._of_all((low + part * (high - low)).exp(), widths)

    def _of_all(self, kl: Tensor, widths: Tensor) -> float:
        """Mean of the KL `[S', T]` of scored tokens, at the time share of all of them, `[S, T, U]` widths.

        The few may take more time than all: KL falls steeply with it, and a policy would be chosen for that alone.
        """
        both = (widths, widths[self._scored])
        there, here = (self._fixed_log_kl(float(self._cost.time_share(each).mean())) for each in both)
        return float(kl.double().mean()) * math.exp(there - here)

    def _fixed_log_kl(self, time_share: float) -> float:
        """Log of the scored tokens' mean KL at a time share, between the fixed widths."""
        points = []
        for width in self._model.bit_widths:
            fixed = torch.full((self._model.num_units,), width)
            kl = float(self.token_kl_nats(fixed).double().mean())
            points.append((float(self._cost.time_share(fixed)), math.log(max(kl, _SMALLEST_KL_NATS))))
        times, logs = zip(*sorted(points), strict=True)
        return float(np.interp(time_share, times, logs))

    def _score(self, widths: Tensor) -> Tensor:
        """`[S', T, U]` -> `[S', T]`; prompts are read at the largest width, as in episodes."""
        top = max(self._model.bit_widths)
        prompt = torch.full((len(widths), self._first, widths.shape[-1]), top)
        logits = self._session.score(self._text, torch.cat([prompt, widths.cpu()], dim=1), first=self._first)
        return self._reference.kl_nats(logits).cpu()

    def _simulated(self, policy: Policy, kl_weight: float) -> Tensor:
        """`[S, T, U]`: what a policy would decide, as far as the record tells."""
        num_rows, num_tokens, _ = self._all_signals.shape
        widths = torch.full((num_rows, self._schema.num_units), max(self._schema.bit_widths))
        means = torch.zeros(num_rows, 0)
        chosen: list[Tensor] = []
        for position in range(num_tokens):
            signals = self._schema.retold(self._all_signals[:, position], kl_weight, widths, means)
            widths = policy(signals).bit_widths.cpu()
            chosen.append(widths)
            means = torch.cat([means, self._model.mean_bit_width(widths).cpu()[:, None]], dim=1)
        return torch.stack(chosen, dim=1)


def signals_at(
    model: NestedCausalLM, profile: Profile, windows: Tensor, env: EnvConfig, bit_widths: Tensor, kl_weight: Tensor
) -> Tensor:
    """What is known before each token of S sequences that are read at allocations.

    Args:
        model: The model.
        profile: Profile that the signals are made with.
        windows: `[S, window_tokens]` int64.
        env: Shape of the episodes.
        bit_widths: `[S, U]` int64.
        kl_weight: `[S]`, the dials.

    Returns:
        `[S, T, dim]` float32 on the CPU.
    """
    num_rows, first = len(windows), env.prompt_tokens
    session = DecodeSession(model, num_rows=num_rows, max_length=env.window_tokens - 1)
    controller = TorchController(model, None, profile, num_rows)
    runner = PolicyRunner(session, controller, Replay(windows[:, first:]))
    runner.start(windows[:, :first], kl_weight)
    signals = [controller.signals().cpu().clone()]
    for _ in range(env.max_new_tokens - 1):
        runner.step(Decision(bit_widths))
        signals.append(controller.signals().cpu().clone())
    session.close()
    return torch.stack(signals, dim=1)
