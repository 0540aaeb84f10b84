"""Traces without a model: random ones, and one whose acceptance a visible signal decides."""

from __future__ import annotations

import numpy as np
import torch

from flexquant_rl.engine.control.traces import (
    NO_TOKEN,
    PlannedSequence,
    RecordingPlan,
    SequenceTrace,
    SplitName,
    Traces,
    occurring_tokens,
)
from flexquant_rl.engine.control.verify_costs import VerifyCosts, modelled_costs

EOS = 0
CLASSES = 3
"""Of the visible toy: the next token is drafted right by all levels, by all but the first, or by none."""
ENTROPIES = (0.2, 2.0, 4.0)


def plan_of(
    num_sequences: int, *, depth: int, max_new_tokens: int, levels: int, splits: tuple[SplitName, ...] = ("train",)
) -> RecordingPlan:
    """A plan of short prompts, the splits in turn, two sequences of a document."""
    sequences = tuple(
        PlannedSequence((1, 2, 3), splits[index % len(splits)], index // 2, "toy") for index in range(num_sequences)
    )
    widths = tuple(range(3, 3 + levels))
    return RecordingPlan("toy", "lean", 8, widths, depth, max_new_tokens, (EOS,), sequences)


def traces_of(plan: RecordingPlan, sequences: list[SequenceTrace]) -> Traces:
    """Traces with random embeddings."""
    ids = occurring_tokens(tuple(sequences))
    embedding = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(0))
    return Traces(plan, tuple(sequences), ids, embedding)


def random_traces(
    rng: np.random.Generator,
    *,
    num_sequences: int = 6,
    depth: int = 4,
    max_new_tokens: int = 15,
    levels: int = 3,
    splits: tuple[SplitName, ...] = ("train",),
    accepted: float = 0.7,
) -> Traces:
    """Random texts of a few tokens, some of which end early, and drafts of which a share agrees."""
    plan = plan_of(num_sequences, depth=depth, max_new_tokens=max_new_tokens, levels=levels, splits=splits)
    sequences = []
    for _ in plan.sequences:
        ends = rng.random() < 0.4
        num_tokens = int(rng.integers(2, max_new_tokens)) if ends else max_new_tokens
        tokens = rng.integers(1, 6, size=num_tokens + 1)
        if ends:
            tokens[-1] = EOS
        drafts = np.full((num_tokens, levels, depth), NO_TOKEN)
        for position in range(num_tokens):
            for level in range(levels):
                for index in range(plan.draft_depth(position)):
                    ahead = position + 1 + index
                    is_right = ahead <= num_tokens and rng.random() < accepted
                    drafts[position, level, index] = tokens[ahead] if is_right else rng.integers(0, 6)
        sequences.append(
            SequenceTrace(
                torch.from_numpy(tokens).int(),
                torch.from_numpy(rng.random((num_tokens + 1, 5))).float(),
                torch.from_numpy(drafts).int(),
                torch.from_numpy(rng.random((num_tokens, levels, depth, 5))).float(),
            )
        )
    return traces_of(plan, sequences)


def visible_traces(
    rng: np.random.Generator, *, num_sequences: int = 12, depth: int = 3, max_new_tokens: int = 40
) -> Traces:
    """Two levels; the entropy of an output says which of them draft the next token right, whoever put it out."""
    plan = plan_of(num_sequences, depth=depth, max_new_tokens=max_new_tokens, levels=2)
    sequences = []
    for _ in plan.sequences:
        classes = rng.choice(CLASSES, p=(0.4, 0.35, 0.25), size=max_new_tokens + depth + 2)
        entropies = np.array(ENTROPIES)[classes]  # at i: of the output that gives token i, about token i + 1
        tokens = np.arange(max_new_tokens + 1) % 5 + 1
        drafts = np.full((max_new_tokens, 2, depth), NO_TOKEN)
        signals = np.zeros((max_new_tokens, 2, depth, 5))
        for position in range(max_new_tokens):
            for level in range(2):
                for index in range(plan.draft_depth(position)):
                    is_right = classes[position + index] <= level
                    drafts[position, level, index] = tokens[position + 1 + index] if is_right else 7
                    signals[position, level, index, 0] = entropies[position + 1 + index]
                    signals[position, level, index, 1] = 0.9
        settled = np.zeros((max_new_tokens + 1, 5))
        settled[:, 0], settled[:, 1] = entropies[: max_new_tokens + 1], 0.9
        tensors = (tokens, settled, drafts, signals)
        kinds = (torch.int32, torch.float32, torch.int32, torch.float32)
        sequences.append(
            SequenceTrace(*(torch.from_numpy(part).to(kind) for part, kind in zip(tensors, kinds, strict=True)))
        )
    return traces_of(plan, sequences)


def toy_costs(levels: int, depth: int) -> VerifyCosts:
    """Drafts at 0.3, 0.4, ... of a step, and a pass of M tokens at 1 + 0.1 (M - 1)."""
    return modelled_costs([0.3 + 0.1 * level for level in range(levels)], (1.0, 1.1), depth=depth)
