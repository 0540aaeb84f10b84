"""What an analysis measures of one nested model: the text at every width, its parts, and where the KL comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexquant_rl.agents.analysis.rows import (
    PartRow,
    PastRow,
    Plan,
    StrategyRow,
    TimeRow,
    TokensRow,
    WindowRow,
    rounded,
)
from flexquant_rl.agents.evaluation.resampling import document_weights, percentile_interval
from flexquant_rl.engine.benches.machine import cpu_name
from flexquant_rl.engine.control.allocation_kl import TextFacts, affordable_windows, allocation_facts
from flexquant_rl.engine.control.output_kl import reference_width
from flexquant_rl.engine.control.past_kl import past_kl_nats
from flexquant_rl.engine.control.reference_facts import reference_facts
from flexquant_rl.engine.control.sensitivity import part_allocations, sensitivity
from flexquant_rl.engine.control.step_timer import halfway, interleaved_ms, step_turn
from flexquant_rl.engine.control.streamed_text import StreamedText
from flexquant_rl.engine.decoding.choice import default_decoder
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.matrix_units import kinds_of, matrix_units
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import Progress
from flexquant_rl.fq_env.prompts import spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Parts are many, so each is measured on the first tokens of few windows: as many as this arithmetic allows, half a
# minute on two cores without AVX-512.
_PART_TOKENS = 96
_PART_FLOP = 2.5e12
# A past is read anew for each width, and then every token behind it: few windows, and not all of their tokens.
_PAST_WINDOWS, _PAST_TOKENS = 4, 64


def window_rows(
    model: NestedCausalLM, plan: Plan, windows: Tensor, sources: Sequence[str], documents: Sequence[int]
) -> list[WindowRow]:
    """What the reference says of the text.

    Args:
        model: Any nested model of the analysis.
        plan: Its sizes.
        windows: `[n, first + T + 1]` int64.
        sources: The file of each window.
        documents: The document of each.
    """
    facts, first = reference_facts(model, windows, first=plan.first), plan.first
    return [
        WindowRow(
            window=index,
            source=sources[index],
            document=documents[index],
            context=str(model.tokenizer.decode(window[:first], skip_special_tokens=True)),
            tokens=_streamed(model, window, first),
            token_ids=tuple(window[first:-1].tolist()),
            token_entropy_nats=rounded(facts.token_entropy_nats[index].tolist()),
            top1_probability=rounded(facts.top1_probability[index].tolist()),
            top1_tokens=_texts(model.tokenizer, facts.top1_ids[index]),
            token_nll_nats=rounded(facts.token_nll_nats[index].tolist()),
        )
        for index, window in enumerate(windows)
    ]


def strategy_rows(
    model: NestedCausalLM,
    strategy: str,
    plan: Plan,
    windows: Tensor,
    text: Sequence[WindowRow],
    seconds: float,
    progress: Progress,
) -> tuple[list[StrategyRow], list[TokensRow]]:
    """One strategy on all the text, at every width.

    Args:
        model: The model as the strategy quantised it.
        strategy: Its name.
        plan: Widths and sizes.
        windows: `[n, first + T + 1]` int64.
        text: `window_rows` of the same windows.
        seconds: What quantising took.
        progress: Shows how far it is.
    """
    session = DecodeSession(model, max_length=windows.shape[1] - 1)
    allocations = torch.tensor(plan.bit_widths)[:, None].repeat(1, model.num_units)
    facts = allocation_facts(
        session,
        windows,
        allocations,
        first=plan.first,
        prompt_width=None,
        progress=lambda items: progress(items, f"{strategy}: text"),
    )
    session.close()
    rows, tokens = [], []
    for bit_width, one in zip(plan.bit_widths, facts, strict=True):
        format_ = Format(strategy, model.config.group_size, bit_width, _bytes_per_weight(model, bit_width), seconds)
        rows.append(summary_row(format_, one, text))
        tokens += tokens_rows(model.tokenizer, strategy, bit_width, one)
    return rows, tokens


@dataclass(frozen=True)
class Format:
    """What a row says about how weights are stored, not about what that loses; fields as in `StrategyRow`."""

    strategy: str
    group_size: int
    bit_width: int
    bytes_per_weight: float
    quantising_seconds: float


def summary_row(stored: Format, facts: TextFacts, text: Sequence[WindowRow]) -> StrategyRow:
    """What one format loses on all the text."""
    kl = facts.output_kl_nats.double()
    weights = document_weights([row.document for row in text])
    low, high = percentile_interval(weights[1:] @ kl.mean(1).numpy())
    reference = torch.tensor([row.token_nll_nats for row in text], dtype=torch.float64)
    return StrategyRow(
        **asdict(stored),
        output_kl_nats=float(kl.mean()),
        output_kl_low=low,
        output_kl_high=high,
        output_kl_p99_nats=float(kl.quantile(0.99)),
        perplexity=float(facts.token_nll_nats.double().mean().exp()),
        reference_perplexity=float(reference.mean().exp()),
        top1_agreement=float(facts.top1_agreement.double().mean()),
        num_tokens=kl.numel(),
    )


@dataclass(frozen=True)
class PeerTurn:
    """Steps of another library in one format.

    Attributes:
        strategy: As in its rows, and so are the next two.
        group_size: Inputs that share a scale.
        bit_width: Bits in its name.
        turn: Makes a few steps halfway through a window and gives the milliseconds of the median one.
    """

    strategy: str
    group_size: int
    bit_width: int
    turn: Callable[[], float]


def time_rows(
    models: Sequence[NestedCausalLM],
    plan: Plan,
    windows: Tensor,
    peers: Sequence[PeerTurn] = (),
    beside: str | None = None,
) -> list[TimeRow]:
    """What a step of the lean decoder takes in the format of each model, and one of each peer, all in turns.

    Args:
        models: Ours, a group size each; the lean decoder can run them.
        plan: Their widths and threads.
        windows: `[n, first + T + 1]` int64; steps are halfway through the first.
        peers: Steps of another library's format, by width.
        beside: Its name.
    """
    sessions = [halfway(model, windows, plan.threads)[0] for model in models]
    forms = [(None, model.config.group_size, width) for model in models for width in plan.bit_widths]
    turns = [step_turn(session, windows[0, :1], width) for session in sessions for width in plan.bit_widths]
    named = [(peer.strategy, peer.group_size, peer.bit_width) for peer in peers]
    times = interleaved_ms([*turns, *(peer.turn for peer in peers)])
    for session in sessions:
        session.close()
    return [
        TimeRow(
            group_size=group_size,
            bit_width=bit_width,
            measured_ms=float(rounds.median()),
            measured_low=float(rounds.quantile(0.25)),
            measured_high=float(rounds.quantile(0.75)),
            num_threads=default_decoder(models[0], plan.threads)[1],
            cpu=cpu_name(),
            strategy=strategy,
            beside=beside,
        )
        for (strategy, group_size, bit_width), rounds in zip([*forms, *named], times, strict=True)
    ]


def part_rows(model: NestedCausalLM, strategy: str, plan: Plan, windows: Tensor, progress: Progress) -> list[PartRow]:
    """The sensitivity of every unit and of every kind of matrix at every width, and of each matrix at one width.

    Arguments as `strategy_rows`.
    """
    every = _PartKind(strategy, windows, plan.bit_widths, progress)
    found = every.rows("unit", model, {unit.name: [index] for index, unit in enumerate(model.units)})
    units = matrix_units(model)
    with model.cut_into(units):
        found += every.rows("matrices", model, kinds_of(units))
        single = {unit.name: [index] for index, unit in enumerate(units)}
        found += replace(every, bit_widths=(plan.part_width,)).rows("matrix", model, single)
    return found


def past_rows(model: NestedCausalLM, strategy: str, plan: Plan, windows: Tensor, progress: Progress) -> list[PastRow]:
    """What comes from the past and what from the token's own step. Arguments as `strategy_rows`."""
    widths = [bit_width for bit_width in plan.bit_widths if bit_width != reference_width(model)]
    judged = torch.arange(plan.first, windows.shape[1] - 1)
    places, chosen = spread(judged, _PAST_TOKENS), spread(torch.arange(len(windows)), _PAST_WINDOWS)
    found = past_kl_nats(
        model,
        windows[chosen, :-1],
        widths,
        places=places,
        progress=lambda items: progress(items, f"{strategy}: past and own step"),
    )
    return [
        PastRow(
            strategy,
            bit_width,
            window,
            tuple((places - plan.first).tolist()),
            rounded(found.own_step[index, row].tolist()),
            rounded(found.past[index, row].tolist()),
        )
        for index, bit_width in enumerate(widths)
        for row, window in enumerate(chosen.tolist())
    ]


@dataclass(frozen=True, eq=False)
class _PartKind:
    """How parts are measured."""

    strategy: str
    windows: Tensor
    bit_widths: tuple[int, ...]
    progress: Progress

    def rows(self, kind: str, model: NestedCausalLM, parts: dict[str, list[int]]) -> list[PartRow]:
        """The sensitivity of some parts, units by name, on as many windows as they can be afforded on."""
        members = list(parts.values())
        read = self.windows[:, : _PART_TOKENS + 1]
        allocations, _, _ = part_allocations(model, members, self.bit_widths)
        read = spread(
            read, affordable_windows(model, allocations, read.shape[1], len(read), least=1, affordable_flop=_PART_FLOP)
        )
        label = f"{self.strategy}: sensitivity, {kind}"
        found = sensitivity(model, read, members, self.bit_widths, progress=lambda items: self.progress(items, label))
        return [
            PartRow(
                strategy=self.strategy,
                kind=kind,
                part=name,
                bit_width=bit_width,
                output_kl_nats=float(kl),
                num_weights=int(model.unit_weights[units].sum()),
                num_windows=len(read),
                num_tokens=read[:, 1:].numel(),
            )
            for (name, units), by_width in zip(parts.items(), found, strict=True)
            for bit_width, kl in zip(self.bit_widths, by_width, strict=True)
        ]


def _bytes_per_weight(model: NestedCausalLM, bit_width: int) -> float:
    read = sum(model.weight_bytes(unit, bit_width) for unit in range(model.num_units))
    return read / int(model.unit_weights.sum())


def tokens_rows(tokenizer: PreTrainedTokenizerBase, strategy: str, bit_width: int, facts: TextFacts) -> list[TokensRow]:
    """One strategy at one width, token by token, a row for each window."""
    return [
        TokensRow(strategy, bit_width, window, rounded(kl.tolist()), rounded(nll.tolist()), _texts(tokenizer, top1))
        for window, (kl, nll, top1) in enumerate(
            zip(facts.output_kl_nats, facts.token_nll_nats, facts.top1_ids, strict=True)
        )
    ]


def _streamed(model: NestedCausalLM, window: Tensor, first: int) -> tuple[str, ...]:
    """What each judged token adds to the text: nothing where it leaves a character incomplete."""
    stream = StreamedText(model.tokenizer, window[:first].tolist())
    return tuple(stream.add(token) for token in window[first:-1].tolist())


def _texts(tokenizer: PreTrainedTokenizerBase, token_ids: Tensor) -> tuple[str, ...]:
    """The text of each token on its own."""
    return tuple(str(tokenizer.decode([token])) for token in token_ids.tolist())
