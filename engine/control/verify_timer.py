"""Timing drafts, passes of verification and decisions on a decoder, as they are served: through rounds and policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import Controller, DraftController, StaticController, make_controller
from flexquant_rl.engine.control.cost import clock_ms
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.drafting_net import DraftingNet
from flexquant_rl.engine.control.drafting_rules import ConfidenceStop, DraftingContext, FixedRounds
from flexquant_rl.engine.control.drafts import Draft, RoundState
from flexquant_rl.engine.control.profile import unmeasured_profile
from flexquant_rl.engine.control.rounds import Rounds
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import ServedDrafts, drafts_at
from flexquant_rl.engine.control.verified_signals import VerifiedSchema
from flexquant_rl.engine.control.verify_costs import VerifyCosts
from flexquant_rl.engine.decoding.decoder import Decoder, StepOutput, greedy_tokens
from flexquant_rl.engine.decoding.next_token import Sampler
from flexquant_rl.engine.model import NestedCausalLM

_LENGTH = 3
"""Drafts of a round that times a level."""
_SHORT_TURNS = 3


def measured_costs(
    decoder: Decoder,
    levels: Tensor,
    *,
    verify_width: int,
    depth: int,
    num_rounds: int = 15,
    context: int = 64,
) -> VerifyCosts:
    """Times rounds of fixed length in random order, so that what slows the machine hits all of them; lower quartiles.

    A step is timed as it is served: the pass, the tokens chosen, the rule asked. A plain step is that of a static
    allocation, at the largest width and at the verify width.

    Args:
        decoder: Has one row, with room for `context + depth + 2` tokens.
        levels: `[L, U]` int64, the allocations that draft.
        verify_width: Width of the passes.
        depth: D, drafts of a round at most.
        num_rounds: Times that each is timed, after one that is not.
        context: Tokens in the cache.
    """
    rounds = _TimedRounds(decoder, verify_width, context)
    length = min(depth, _LENGTH)
    # Level and number of drafts; no level is a plain step of so many bits. Short ones more often: they are the unit of
    # all others.
    plain_widths = {max(decoder.model.bit_widths), verify_width}
    short: list[tuple[int | None, int]] = [(0, 0), *((None, width) for width in sorted(plain_widths))]
    kinds = short * _SHORT_TURNS
    kinds += [(0, own) for own in range(1, depth + 1)]
    kinds += [(level, length) for level in range(1, len(levels))]
    plain_ms: dict[int, list[float]] = {width: [] for width in plain_widths}
    draft_ms: list[list[float]] = [[] for _ in levels]
    verify_ms: list[list[float]] = [[] for _ in range(depth + 1)]
    generator = torch.Generator().manual_seed(0)
    for turn in range(num_rounds + 1):
        for index in torch.randperm(len(kinds), generator=generator).tolist():
            level, own = kinds[index]
            times = [rounds.plain_ms(own)] if level is None else rounds.round_ms(levels[level], own)
            if turn == 0:
                continue
            if level is None:
                plain_ms[own] += times
                continue
            draft_ms[level] += times[:-1]
            verify_ms[own].append(times[-1])
    return VerifyCosts(
        "measured",
        _undisturbed(plain_ms[max(plain_widths)]),
        _undisturbed(plain_ms[verify_width]),
        tuple(map(_undisturbed, draft_ms)),
        tuple(map(_undisturbed, verify_ms)),
    )


def _undisturbed(times_ms: Sequence[float]) -> float:
    """The lower quartile: other work on the machine only adds to a time, and to half of them where there is much."""
    return sorted(times_ms)[len(times_ms) // 4]


class _TimedRounds:
    """Rounds that all begin behind the same tokens.

    Args:
        decoder: Has one row.
        verify_width: Width of the passes.
        context: Tokens in the cache.
    """

    def __init__(self, decoder: Decoder, verify_width: int, context: int) -> None:
        self._decoder, self._model = decoder, decoder.model
        prompt = torch.arange(context) % decoder.model.vocab_size
        self._prompt: list[int] = prompt.tolist()
        self._output = decoder.prefill(prompt[None])
        self._upcoming = greedy_tokens(self._output.logits)
        self._held = decoder.lengths.clone()
        self._verify = self._at(verify_width)

    def plain_ms(self, width: int) -> float:
        """Milliseconds of a plain step at a width."""
        plain = StaticController(StaticAllocation("timed", self._at(width)))
        runner = PolicyRunner(self._decoder, plain, first_token_ids=self._upcoming)
        ms = clock_ms(runner.step, self._model.device)
        self._decoder.truncate(self._held)
        return ms

    def round_ms(self, widths: Tensor, length: int) -> list[float]:
        """Milliseconds of each step of a round of so many drafts at widths `[U]`, the verify step last."""
        policy = drafts_at("timed", widths, self._verify, length=max(length, 1))
        rounds = Rounds(self._decoder, DraftController(policy, None), Sampler(1))
        rounds.begin(0, self._prompt, int(self._upcoming))
        wanted = length + 1  # no room for more drafts
        times = [clock_ms(lambda: rounds.step(0, wanted), self._model.device) for _ in range(wanted)]
        self._decoder.truncate(self._held)
        return times

    def _at(self, width: int) -> Tensor:
        return torch.full((self._model.num_units,), width)


class LookingTimes(NamedTuple):
    """What looking costs, as in `VerifyCosts`."""

    controller_ms: float
    confidence_ms: float
    settled_ms: float


def measured_looking_ms(model: NestedCausalLM, schema: VerifiedSchema, *, num_decisions: int = 300) -> LookingTimes:
    """Milliseconds that looking costs a decision, over one that counts drafts alone, and a token that is settled.

    Neither what a network has learned nor what a model says changes how long this takes: weights and outputs are
    random.

    Args:
        model: Has the vocabulary and the embedding.
        schema: What the policy observes.
        num_decisions: How many are timed of each kind; the lower quartile counts.
    """
    context = DraftingContext(schema)
    levels = torch.full((schema.num_levels, model.num_units), min(model.bit_widths))
    verify = torch.full((model.num_units,), max(model.bit_widths))
    net = DraftingNet(schema).policy()
    policies = (
        ServedDrafts("counting", schema, levels, verify, FixedRounds(0, schema.depth).bind(context), "nothing"),
        ServedDrafts("sure", schema, levels, verify, ConfidenceStop(0).bind(context), "confidences"),
        ServedDrafts("looking", schema, levels, verify, net, "signals"),
    )
    logits = torch.randn(1, model.vocab_size, generator=torch.Generator().manual_seed(0))
    output = StepOutput(logits, torch.ones(1, model.num_units), torch.ones(1, model.num_units))
    deciding = [_Deciding(model, policy, output) for policy in policies]
    timed: list[Callable[[], None]] = [*deciding, deciding[-1].see]
    times = [[clock_ms(one, model.device) for one in timed] for _ in range(num_decisions)]
    counting, sure, looking, settled = (_undisturbed(column) for column in zip(*times, strict=True))
    return LookingTimes(max(looking - counting, 0.0), max(sure - counting, 0.0), settled)


class _Deciding:
    """A decision after a draft, without the pass."""

    def __init__(self, model: NestedCausalLM, policy: ServedDrafts, output: StepOutput) -> None:
        self._controller: Controller = make_controller(model, policy, unmeasured_profile(model))
        self._output, self._widths = output, policy.level_bit_widths[0]
        self._token, self._rows = torch.zeros(1, dtype=torch.int64), torch.tensor([0])
        self._controller.reset(output, self._token, torch.ones(1))

    def __call__(self) -> None:
        """Draws the decision."""
        assert isinstance(self._controller, DraftController)
        if self._controller.uses_signals:
            # Each token is seen twice: as a draft and, where it is accepted, in the pass that settles it.
            self.see()
            self.see()
        top1 = self._controller.top1_probability(0)
        draft = Draft(0, self._widths, self._output.logits[0], top1_probability=top1)
        self._controller.decide_round(0, RoundState((draft,), 1))

    def see(self) -> None:
        """Takes what a pass put out at one token into the signals."""
        self._controller.update(self._output, self._widths[None], self._token, self._rows)
