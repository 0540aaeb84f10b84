"""A policy at work on rows of tokens: what a step put out goes in, the decision for the next step comes out.

Five controllers give the same decisions at different cost: none of a fixed allocation's own, a count of tokens where
the position decides, a look-up where the token does, native code on the CPU, torch for everything else. A sixth asks a
policy that drafts, and takes its signals from one of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.decision import Decision, Policy, PositionPolicy, StaticAllocation, joined_rows
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.drafts import DraftPolicy, RoundState
from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.served_drafts import ServedDrafts, own_ngram_drafts
from flexquant_rl.engine.control.signals import (
    SignalMark,
    SignalSchema,
    SignalTracker,
    project_embedding,
    unit_constants,
    unit_depths,
)
from flexquant_rl.engine.control.token_policy import TokenPolicy
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.decoding.decoder import DecoderModel, StepOutput
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.kernels.native_control import ControlMark, ControlWeights, NativeControl, PolicyNetWeights


class Controller(Protocol):
    """Decides the steps of R rows. Where `rows` `[R']` is not given, a call is about all of them."""

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """Starts rows after prompts.

        Args:
            output: What the prompts' last tokens put out, `[R', ...]`.
            next_token_ids: `[R']` int64, what the first step reads.
            kl_weight: `[R']` float32, the dials.
            rows: `[R']` int64.
        """

    def decide(self, rows: Tensor | None = None) -> Decision:
        """The decision for the next step of R' rows; the widths are on the CPU."""

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """Tells what a step at widths `[R', U]` put out and which tokens `[R']` the next one reads."""

    def mark(self) -> Any:
        """Remembers the state of all rows."""

    def rollback(self, mark: Any, rows: Tensor | None = None) -> None:
        """Returns rows to a mark, as if what they saw since had never happened."""


def make_controller(
    model: NestedCausalLM, policy: Policy | DraftPolicy, profile: Profile | None, *, num_rows: int = 1
) -> Controller:
    """Picks the cheapest controller that gives the policy's decisions.

    Args:
        model: The model.
        policy: The policy.
        profile: The profile that the policy was trained with; None where a policy sees none.
        num_rows: R.
    """
    if isinstance(policy, StaticAllocation):
        return StaticController(policy, num_rows)
    if isinstance(policy, DeployedDrafts) and policy.never_drafts:
        return StaticController(StaticAllocation(policy.name, policy.verify_bit_widths), num_rows)
    if isinstance(policy, PositionPolicy):
        return PositionController(policy, num_rows)
    if isinstance(policy, TokenPolicy):
        return TokenController(policy, model.embedding_matrix(), num_rows)
    assert profile is not None, "a policy that looks at signals has a profile"
    if isinstance(policy, DraftPolicy):
        signals = _signals_alone(model, profile, num_rows) if policy.uses_signals else None
        return DraftController(policy, signals, num_rows)
    return _deciding(model, policy, profile, num_rows)


def _signals_alone(model: NestedCausalLM, profile: Profile, num_rows: int) -> NativeController | TorchController:
    return _deciding(model, None, profile, num_rows)


def _deciding(
    model: NestedCausalLM, policy: Policy | None, profile: Profile, num_rows: int
) -> NativeController | TorchController:
    if default_decoder(model)[0] == "lean":
        depths = unit_depths(model)
        embedding, unit_weights = model.embedding_matrix(), model.unit_weights
        return NativeController(policy, profile, embedding, depths, unit_weights, num_rows=num_rows)
    return TorchController(model, policy, profile, num_rows)


class StaticController:
    """The same widths at every step; looks at nothing."""

    def __init__(self, policy: StaticAllocation, num_rows: int = 1) -> None:
        self._policy = policy
        self._decision = Decision(policy.bit_widths.cpu().expand(num_rows, -1).contiguous())

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """Nothing to start."""

    def decide(self, rows: Tensor | None = None) -> Decision:
        """See `Controller`."""
        return self._decision if rows is None else Decision(self._decision.bit_widths[rows])

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """Nothing to learn."""

    def mark(self) -> None:
        """Nothing to remember."""

    def rollback(self, mark: None, rows: Tensor | None = None) -> None:
        """Nothing to undo."""


class PositionController:
    """Counts tokens and looks at nothing.

    Args:
        policy: What the counts decide.
        num_rows: R.
    """

    def __init__(self, policy: PositionPolicy, num_rows: int = 1) -> None:
        self._policy = policy
        self._positions = torch.zeros(num_rows, dtype=torch.int64)

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        self._put(rows, torch.zeros(len(next_token_ids), dtype=torch.int64))

    def decide(self, rows: Tensor | None = None) -> Decision:
        """See `Controller`."""
        return Decision(self._policy.at(self._of(rows)))

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """See `Controller`."""
        self._put(rows, self._of(rows) + 1)

    def mark(self) -> Tensor:
        """See `Controller`."""
        return self._positions

    def rollback(self, mark: Tensor, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        self._put(rows, mark if rows is None else mark[rows])

    def _of(self, rows: Tensor | None) -> Tensor:
        return self._positions if rows is None else self._positions[rows]

    def _put(self, rows: Tensor | None, positions: Tensor) -> None:
        """Never in place: marks keep the old tensor, and so may the policy."""
        self._positions = positions if rows is None else self._positions.index_copy(0, rows, positions)


class TokenController:
    """Looks up what the token about to be read needs, and looks at nothing else.

    Args:
        policy: What the tokens decide.
        embedding: `[vocab, d]` input embeddings of the model.
        num_rows: R.
    """

    def __init__(self, policy: TokenPolicy, embedding: Tensor, num_rows: int = 1) -> None:
        self._table = policy.table(embedding)
        self._token_ids = [0] * num_rows
        self._kl_weights = [1.0] * num_rows

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        for row, token, dial in zip(self._chosen(rows), next_token_ids.tolist(), kl_weight.tolist(), strict=True):
            self._token_ids[row], self._kl_weights[row] = token, dial

    def decide(self, rows: Tensor | None = None) -> Decision:
        """See `Controller`."""
        chosen = self._chosen(rows)
        tokens, dials = [self._token_ids[row] for row in chosen], [self._kl_weights[row] for row in chosen]
        return Decision(self._table.widths(tokens, dials))

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """See `Controller`."""
        for row, token in zip(self._chosen(rows), next_token_ids.tolist(), strict=True):
            self._token_ids[row] = token

    def mark(self) -> tuple[list[int], list[float]]:
        """See `Controller`."""
        return [*self._token_ids], [*self._kl_weights]

    def rollback(self, mark: tuple[list[int], list[float]], rows: Tensor | None = None) -> None:
        """See `Controller`."""
        for row in self._chosen(rows):
            self._token_ids[row], self._kl_weights[row] = mark[0][row], mark[1][row]

    def _chosen(self, rows: Tensor | None) -> Sequence[int]:
        return _indices(rows, len(self._token_ids))


class TorchController:
    """Any policy, on any device: the reference.

    Args:
        model: The model.
        policy: The policy; None where decisions come from elsewhere, as an environment's actions do. It may be
            exchanged between steps: policies keep no state.
        profile: The profile that the policy was trained with.
        num_rows: R.
    """

    def __init__(self, model: DecoderModel, policy: Policy | None, profile: Profile, num_rows: int = 1) -> None:
        self._model = model
        self._policy = policy
        schema = SignalSchema(model.num_units, model.bit_widths, horizon=_horizon(policy))
        self.tracker = SignalTracker(schema, profile, model.embedding_matrix(), unit_depths(model), num_rows)

    @property
    def policy(self) -> Policy | None:
        """The policy, if it has one."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | None) -> None:
        self._policy = policy
        self.tracker.schema = replace(self.tracker.schema, horizon=_horizon(policy))

    @property
    def schema(self) -> SignalSchema:
        """What the signals are."""
        return self.tracker.schema

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        self.tracker.reset(output, next_token_ids, kl_weight, rows)

    def signals(self, rows: Tensor | None = None) -> Tensor:
        """What the policy sees, `[R', dim]` float32."""
        return self.tracker.signals(rows)

    def top1_probability(self, row: int) -> float:
        """Probability of the likeliest token of the newest output of one row."""
        return self.tracker.top1_probability(row)

    def decide(self, rows: Tensor | None = None) -> Decision:
        """See `Controller`."""
        assert self._policy is not None, "without a policy every step is given its decision"
        decision = self._policy(self.tracker.signals(rows))
        return Decision(decision.bit_widths.cpu(), decision.verify)

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """See `Controller`."""
        mean_width = self._model.mean_bit_width(bit_widths)
        self.tracker.update(output, bit_widths, next_token_ids, mean_width, rows)

    def mark(self) -> SignalMark:
        """See `Controller`."""
        return self.tracker.mark()

    def rollback(self, mark: SignalMark, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        self.tracker.rollback(mark, rows)


class NativeController:
    """Native signals on the CPU, and the network of a learned policy too: `TorchController` up to rounding.

    Args:
        policy: The policy; None where signals alone are wanted.
        profile: The profile that it was trained with.
        embedding: `[vocab, d]` input embeddings.
        depths: `[U]` relative depth of each unit, 0 to 1.
        unit_weights: `[U]` weights in each unit.
        num_rows: R.
    """

    def __init__(
        self,
        policy: Policy | None,
        profile: Profile,
        embedding: Tensor,
        depths: Sequence[float],
        unit_weights: Tensor,
        *,
        num_rows: int = 1,
    ) -> None:
        schema = SignalSchema(len(depths), profile.bit_widths, horizon=_horizon(policy))
        weights = unit_weights.float()
        self._policy = None if isinstance(policy, LearnedPolicy) else policy
        control = ControlWeights(
            net=_net_weights(policy) if isinstance(policy, LearnedPolicy) else None,
            bit_widths=schema.bit_widths,
            embedding=project_embedding(embedding, schema.num_embedding_dims),
            unit_constants=unit_constants(profile, schema),
            depth=torch.tensor(depths, dtype=torch.float32),
            weight_share=weights / weights.sum(),
            horizon=schema.horizon,
        )
        self._rows = [NativeControl(control) for _ in range(num_rows)]
        assert self._rows[0].dim == schema.dim, "signals changed in one place"

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        tokens, dials = next_token_ids.tolist(), kl_weight.tolist()
        for index, row in enumerate(self._chosen(rows)):
            parts = (output.logits[index], output.residual_update[index], output.crest[index])
            row.reset(*parts, tokens[index], dials[index])

    def signals(self, rows: Tensor | None = None) -> Tensor:
        """What the policy sees, `[R', dim]` float32."""
        return torch.stack([row.signals() for row in self._chosen(rows)])

    def top1_probability(self, row: int) -> float:
        """Probability of the likeliest token of the newest output of one row."""
        return self._rows[row].top1

    def decide(self, rows: Tensor | None = None) -> Decision:
        """See `Controller`."""
        if self._policy is not None:
            decision = self._policy(self.signals(rows))
            # A class of the user's may well have expanded one width over all units.
            return Decision(decision.bit_widths.contiguous(), decision.verify)
        return Decision(joined_rows([row.decide() for row in self._chosen(rows)]))

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """See `Controller`."""
        tokens = next_token_ids.tolist()
        for index, row in enumerate(self._chosen(rows)):
            parts = (output.logits[index], output.residual_update[index], output.crest[index])
            row.update(*parts, bit_widths[index], tokens[index])

    def mark(self) -> list[ControlMark]:
        """See `Controller`."""
        return [row.mark() for row in self._rows]

    def rollback(self, mark: list[ControlMark], rows: Tensor | None = None) -> None:
        """See `Controller`."""
        for index in _indices(rows, len(self._rows)):
            self._rows[index].rollback(mark[index])

    def _chosen(self, rows: Tensor | None) -> list[NativeControl]:
        return self._rows if rows is None else [self._rows[index] for index in rows.tolist()]


class DraftController:
    """Asks a policy that drafts, with signals where it uses them.

    Args:
        policy: The policy.
        signals: Follows the rows for a policy that uses signals.
        num_rows: R.
    """

    def __init__(
        self, policy: DraftPolicy, signals: NativeController | TorchController | None, num_rows: int = 1
    ) -> None:
        self._policy = policy
        self._of_row = [_restarted(policy)] * num_rows
        self._signals = signals

    @property
    def uses_signals(self) -> bool:
        """Whether `update` has to be told anything."""
        return self._signals is not None

    @property
    def verify_bit_widths(self) -> Tensor:
        """`[U]` int64 that the text equals."""
        return self._policy.verify_bit_widths

    @property
    def ngram_drafts(self) -> int:
        """Drafts of a round at most that the policy was made to have looked up in the text."""
        return own_ngram_drafts(self._policy)

    def decide_round(self, row: int, state: RoundState) -> Decision:
        """The decision for the next step of one row, `[1, U]`."""
        return self._of_row[row](self.signals(row), state)

    def top1_probability(self, row: int) -> float | None:
        """Of the newest output of one row, where signals are followed."""
        return None if self._signals is None else self._signals.top1_probability(row)

    def signals(self, row: int) -> Tensor | None:
        """What a policy that uses signals sees of one row, `[1, dim]` float32."""
        return None if self._signals is None else self._signals.signals(torch.tensor([row]))

    def reset(self, output: StepOutput, next_token_ids: Tensor, kl_weight: Tensor, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        for row in self._chosen(rows):
            self._of_row[row] = _restarted(self._policy)
        if self._signals is not None:
            self._signals.reset(output, next_token_ids, kl_weight, rows)

    def decide(self, rows: Tensor | None = None) -> Decision:
        """See `Controller`: where a step has to settle its token, as a given text's, there is no room for drafts."""
        return Decision(torch.cat([self.decide_round(row, RoundState()).bit_widths for row in self._chosen(rows)]))

    def update(
        self, output: StepOutput, bit_widths: Tensor, next_token_ids: Tensor, rows: Tensor | None = None
    ) -> None:
        """See `Controller`."""
        if self._signals is not None:
            self._signals.update(output, bit_widths, next_token_ids, rows)

    def mark(self) -> Any:
        """See `Controller`."""
        return None if self._signals is None else self._signals.mark()

    def rollback(self, mark: Any, rows: Tensor | None = None) -> None:
        """See `Controller`."""
        if self._signals is not None:
            self._signals.rollback(mark, rows)

    def _chosen(self, rows: Tensor | None) -> Sequence[int]:
        return _indices(rows, len(self._of_row))


def _indices(rows: Tensor | None, num_rows: int) -> Sequence[int]:
    """The rows that a call is about, one after the other."""
    return range(num_rows) if rows is None else rows.tolist()


def _restarted(policy: DraftPolicy) -> DraftPolicy:
    """The policy for a row that begins a text."""
    return policy.restarted() if isinstance(policy, ServedDrafts) else policy


def _horizon(policy: Policy | None) -> int | None:
    """How far a policy has seen positions."""
    return policy.card.schema.horizon if isinstance(policy, LearnedPolicy) else None


def _net_weights(policy: LearnedPolicy) -> PolicyNetWeights:
    net = policy.net
    return PolicyNetWeights(
        net.mean,
        net.std,
        encode_global=_weight_and_bias(net.encode_global[0]),
        first=_weight_and_bias(net.encode_unit[0]),
        second=_weight_and_bias(net.encode_unit[2]),
        width_head=_weight_and_bias(net.width_head),
    )


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach(), linear.bias.detach()
