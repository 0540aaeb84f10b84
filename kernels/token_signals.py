"""The signals of a step on the GPU: from logits and layer statistics to the vector that the policy network reads.

`engine/control/signals.py` is the definition. The vocabulary is walked twice, for its normaliser and then for all that
needs probabilities: divergence from the last distribution is a sum of differences, which one pass over unnormalised
values would lose to cancellation. A third, single program puts the vector together.
"""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.kernels import signal_constants
from flexquant_rl.kernels.launching import check_tensor, constant, jit, next_power_of_two, require_triton, tl

_BLOCK = 1024
_EMA_DECAY = constant(signal_constants.EMA_DECAY)
_RECENT_TOKENS = constant(signal_constants.RECENT_TOKENS)
_LOG_PROBABILITY_FLOOR = constant(signal_constants.LOG_PROBABILITY_FLOOR)
_KL_FLOOR_NATS = constant(signal_constants.KL_FLOOR_NATS)
_STATISTIC_FLOOR = constant(signal_constants.STATISTIC_FLOOR)
_SIGNAL_LIMIT = constant(signal_constants.SIGNAL_LIMIT)
_NATS_SCALE = constant(signal_constants.NATS_SCALE)
_DECADES_SCALE = constant(signal_constants.DECADES_SCALE)
_WIDTH_SCALE = constant(signal_constants.WIDTH_SCALE)
_NO_HORIZON = 2**31 - 1  # no text is as long
_POSITION_SCALE = constant(signal_constants.POSITION_SCALE)
_NUM_TOKEN_SIGNALS = constant(signal_constants.NUM_TOKEN_SIGNALS)
_NUM_STEP_SIGNALS = constant(signal_constants.NUM_STEP_SIGNALS)
# What a step says where no probe is ever taken: the floor of the divergence, as long ago as can be said.
_NO_PROBE_KL = constant(math.log10(signal_constants.KL_FLOOR_NATS) / signal_constants.DECADES_SCALE)


@dataclass(frozen=True, eq=False)
class SignalConstants:
    """What is the same at every step, on one device.

    Attributes:
        embedding: `[V, E]` float32, projected input embeddings.
        unit_constants: `[U, 2 W]` float32, log sensitivities and times saved.
        depth: `[U]` float32.
        weight_share: `[U]` float32, each unit's share of the weights.
        layer_of_unit: `[U]` int32, each unit's column of the layer statistics.
        horizon: Position from which on its signal stays the same, if there is one.
    """

    embedding: Tensor
    unit_constants: Tensor
    depth: Tensor
    weight_share: Tensor
    layer_of_unit: Tensor
    horizon: int | None = None

    @property
    def dim(self) -> int:
        """Length of the signal vector."""
        num_units, num_constants = self.unit_constants.shape
        num_unit_signals = num_constants + signal_constants.NUM_STEP_SIGNALS
        return signal_constants.NUM_TOKEN_SIGNALS + self.embedding.shape[1] + num_units * num_unit_signals


@dataclass(frozen=True, eq=False)
class SignalState:
    """What a sequence carries from step to step, and the vector.

    Attributes:
        signals: `[1, dim]` float32, what the policy sees.
        log_probs: `[V]` float32, the last output distribution.
        entropy_average: `[1]` float32, moving average of its entropy.
        recent_widths: `[16]` float32, mean widths of the last 16 steps, in turn.
        dial: `[1]` float32, log10 of the KL weight.
        normaliser: `[2, B]` float32, largest logit and sum of exponentials of each block of the vocabulary.
        parts: `[4, B]` float32: entropy, divergence, and the two largest log-probabilities of each block.
    """

    signals: Tensor
    log_probs: Tensor
    entropy_average: Tensor
    recent_widths: Tensor
    dial: Tensor
    normaliser: Tensor
    parts: Tensor

    @staticmethod
    def allocate(constants: SignalConstants) -> SignalState:
        """Allocates for one sequence."""
        vocab_size, device = len(constants.embedding), constants.embedding.device
        blocks = -(-vocab_size // _BLOCK)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float32, device=device)

        return SignalState(
            signals=zeros(1, constants.dim),
            log_probs=zeros(vocab_size),
            entropy_average=zeros(1),
            recent_widths=zeros(signal_constants.RECENT_TOKENS),
            dial=zeros(1),
            normaliser=zeros(2, blocks),
            parts=zeros(4, blocks),
        )


def update_signals(
    constants: SignalConstants,
    state: SignalState,
    logits: Tensor,
    statistics: Tensor,
    bit_widths: Tensor,
    token: Tensor,
    count: Tensor,
    *,
    is_first: bool = False,
) -> Tensor:
    """Moves the signals on by a step, as `SignalTracker.update` does, or starts them as `SignalTracker.reset` does.

    Never synchronises, allocates nothing. Three launches.

    Shapes: V vocabulary, L layers, U units.

    Args:
        constants: Constants of model and policy.
        state: Updated.
        logits: `[V]` float32 of the step.
        statistics: `[2, L + 1]` float32: residual updates and crests, 0 in the last column, which is the head's.
        bit_widths: `[U]` int32 that the step ran at; the largest width after a prompt.
        token: `[1]` int64, the token that the next step reads.
        count: `[1]` int64, steps since the prompt, this one included.
        is_first: Whether the logits are the prompt's.

    Returns:
        `state.signals`.

    Raises:
        ValueError: If a tensor has another dtype, shape, device or stride.
        RuntimeError: If Triton is not installed.
    """
    device = logits.device
    require_triton(device)
    (vocab_size, num_dims), (num_units, num_constants) = constants.embedding.shape, constants.unit_constants.shape
    blocks = -(-vocab_size // _BLOCK)
    check_tensor("logits", logits, dtype=torch.float32, shape=(vocab_size,), device=device)
    check_tensor("statistics", statistics, dtype=torch.float32, shape=(2, -1), device=device)
    check_tensor("bit_widths", bit_widths, dtype=torch.int32, shape=(num_units,), device=device)
    check_tensor("token", token, dtype=torch.int64, shape=(1,), device=device)
    check_tensor("count", count, dtype=torch.int64, shape=(1,), device=device)
    check_tensor("signals", state.signals, dtype=torch.float32, shape=(1, constants.dim), device=device)
    check_tensor("log_probs", state.log_probs, dtype=torch.float32, shape=(vocab_size,), device=device)
    sizes = {"VOCAB_SIZE": vocab_size, "NUM_BLOCKS": blocks, "BLOCK": _BLOCK}
    _normaliser_kernel[(blocks,)](logits, state.normaliser, **sizes, num_warps=4)
    _distribution_kernel[(blocks,)](
        logits,
        state.normaliser,
        state.log_probs,
        state.parts,
        **sizes,
        BLOCK_BLOCKS=next_power_of_two(blocks),
        num_warps=4,
    )
    _signals_kernel[(1,)](
        state.parts,
        state.log_probs,
        statistics,
        bit_widths,
        token,
        count,
        constants.embedding,
        constants.unit_constants,
        constants.depth,
        constants.weight_share,
        constants.layer_of_unit,
        state.entropy_average,
        state.recent_widths,
        state.dial,
        state.signals,
        num_units,
        statistics.shape[1],
        _NO_HORIZON if constants.horizon is None else constants.horizon,
        NUM_BLOCKS=blocks,
        NUM_DIMS=num_dims,
        NUM_CONSTANTS=num_constants,
        IS_FIRST=is_first,
        BLOCK_BLOCKS=next_power_of_two(blocks),
        BLOCK_UNITS=next_power_of_two(num_units),
        BLOCK_DIMS=next_power_of_two(num_dims),
        BLOCK_CONSTANTS=next_power_of_two(num_constants),
        num_warps=4,
    )
    return state.signals


@jit()
def _normaliser_kernel(
    logits_ptr, normaliser_ptr, VOCAB_SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token, mask=token < VOCAB_SIZE, other=float("-inf"))
    largest = tl.max(logits, axis=0)
    # A block may hold nothing but minus infinity.
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(normaliser_ptr + block, largest)
    tl.store(normaliser_ptr + NUM_BLOCKS + block, tl.sum(tl.exp(logits - shift), axis=0))


@jit()
def _distribution_kernel(
    logits_ptr,
    normaliser_ptr,
    log_probs_ptr,
    parts_ptr,
    VOCAB_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    every = tl.arange(0, BLOCK_BLOCKS)
    maxima = tl.load(normaliser_ptr + every, mask=every < NUM_BLOCKS, other=float("-inf"))
    sums = tl.load(normaliser_ptr + NUM_BLOCKS + every, mask=every < NUM_BLOCKS, other=0.0)
    largest = tl.max(maxima, axis=0)
    log_total = tl.log(tl.sum(sums * tl.exp(maxima - largest), axis=0))
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    exists = token < VOCAB_SIZE
    logits = tl.load(logits_ptr + token, mask=exists, other=0.0)
    previous = tl.load(log_probs_ptr + token, mask=exists, other=0.0)
    log_probs = tl.maximum(logits - largest - log_total, _LOG_PROBABILITY_FLOOR)
    probs = tl.where(exists, tl.exp(log_probs), 0.0)
    scores = tl.where(exists, log_probs, float("-inf"))
    top = tl.argmax(scores, axis=0, tie_break_left=True)
    tl.store(parts_ptr + block, -tl.sum(probs * log_probs, axis=0))
    tl.store(parts_ptr + NUM_BLOCKS + block, tl.sum(probs * (log_probs - previous), axis=0))
    tl.store(parts_ptr + 2 * NUM_BLOCKS + block, tl.max(scores, axis=0))
    others = tl.where(tl.arange(0, BLOCK) == top, float("-inf"), scores)
    tl.store(parts_ptr + 3 * NUM_BLOCKS + block, tl.max(others, axis=0))
    # Last: the sum above has met every thread's share of the old distribution.
    tl.store(log_probs_ptr + token, log_probs, mask=exists)


@jit()
def _log10(x):
    return tl.log(x) * 0.4342944819032518


@jit()
def _clipped(x):
    return tl.minimum(tl.maximum(x, -_SIGNAL_LIMIT), _SIGNAL_LIMIT)


@jit(
    do_not_specialize=["num_units", "num_columns", "horizon"],
    do_not_specialize_on_alignment=["bit_widths_ptr", "token_ptr", "count_ptr", "average_ptr", "dial_ptr"],
)
def _signals_kernel(
    parts_ptr,
    log_probs_ptr,
    statistics_ptr,
    bit_widths_ptr,
    token_ptr,
    count_ptr,
    embedding_ptr,
    constants_ptr,
    depth_ptr,
    share_ptr,
    layer_ptr,
    average_ptr,
    recent_ptr,
    dial_ptr,
    signals_ptr,
    num_units,
    num_columns,
    horizon,
    NUM_BLOCKS: tl.constexpr,
    NUM_DIMS: tl.constexpr,
    NUM_CONSTANTS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    BLOCK_CONSTANTS: tl.constexpr,
):
    block = tl.arange(0, BLOCK_BLOCKS)
    in_parts = block < NUM_BLOCKS
    entropy = tl.sum(tl.load(parts_ptr + block, mask=in_parts, other=0.0), axis=0)
    kl = tl.sum(tl.load(parts_ptr + NUM_BLOCKS + block, mask=in_parts, other=0.0), axis=0)
    firsts = tl.load(parts_ptr + 2 * NUM_BLOCKS + block, mask=in_parts, other=float("-inf"))
    seconds = tl.load(parts_ptr + 3 * NUM_BLOCKS + block, mask=in_parts, other=float("-inf"))
    best = tl.argmax(firsts, axis=0, tie_break_left=True)
    top1 = tl.exp(tl.max(firsts, axis=0))
    top2 = tl.exp(tl.max(tl.where(block == best, seconds, firsts), axis=0))

    unit = tl.arange(0, BLOCK_UNITS)
    exists = unit < num_units
    widths = tl.load(bit_widths_ptr + unit, mask=exists, other=0).to(tl.float32)
    count = tl.load(count_ptr)
    slot = tl.arange(0, _RECENT_TOKENS)
    recent = tl.load(recent_ptr + slot)
    if IS_FIRST:
        average = entropy
        kl = 0.0
    else:
        average = _EMA_DECAY * tl.load(average_ptr) + (1 - _EMA_DECAY) * entropy
        mean_width = tl.sum(widths * tl.load(share_ptr + unit, mask=exists, other=0.0), axis=0)
        recent = tl.where(slot == (count % _RECENT_TOKENS).to(tl.int32), mean_width, recent)
    token = tl.load(token_ptr)
    surprisal = -tl.load(log_probs_ptr + token)
    dial = tl.load(dial_ptr)
    dim = tl.arange(0, BLOCK_DIMS)
    embedding = tl.load(embedding_ptr + token * NUM_DIMS + dim, mask=dim < NUM_DIMS, other=0.0)
    layer = tl.load(layer_ptr + unit, mask=exists, other=0)
    update = tl.load(statistics_ptr + layer, mask=exists, other=0.0)
    crest = tl.load(statistics_ptr + num_columns + layer, mask=exists, other=0.0)
    tl.debug_barrier()  # every thread has read the state before one of them writes it
    tl.store(average_ptr, average)
    tl.store(recent_ptr + slot, recent)

    tl.store(signals_ptr + 0, _clipped(entropy / _NATS_SCALE))
    tl.store(signals_ptr + 1, _clipped(average / _NATS_SCALE))
    tl.store(signals_ptr + 2, _clipped(tl.log(1.0 + tl.exp(average)) / _NATS_SCALE))
    tl.store(signals_ptr + 3, top1)
    tl.store(signals_ptr + 4, top1 - top2)
    tl.store(signals_ptr + 5, _clipped(surprisal / _NATS_SCALE))
    tl.store(signals_ptr + 6, _clipped(_log10(tl.maximum(kl, _KL_FLOOR_NATS)) / _DECADES_SCALE))
    tl.store(signals_ptr + 7, _NO_PROBE_KL)
    tl.store(signals_ptr + 8, 1.0)
    tl.store(signals_ptr + 9, tl.sum(recent, axis=0) / (_RECENT_TOKENS * _WIDTH_SCALE))
    tl.store(signals_ptr + 10, _clipped(tl.log(1.0 + tl.minimum(count, horizon).to(tl.float32)) / _POSITION_SCALE))
    tl.store(signals_ptr + 11, _clipped(dial))
    tl.store(signals_ptr + _NUM_TOKEN_SIGNALS + dim, _clipped(embedding), mask=dim < NUM_DIMS)

    unit_ptr = signals_ptr + _NUM_TOKEN_SIGNALS + NUM_DIMS + unit * (NUM_CONSTANTS + _NUM_STEP_SIGNALS)
    column = tl.arange(0, BLOCK_CONSTANTS)
    in_constants = exists[:, None] & (column < NUM_CONSTANTS)[None, :]
    constants = tl.load(constants_ptr + unit[:, None] * NUM_CONSTANTS + column[None, :], mask=in_constants, other=0.0)
    tl.store(unit_ptr[:, None] + column[None, :], _clipped(constants), mask=in_constants)
    tl.store(unit_ptr + NUM_CONSTANTS, _clipped(_log10(tl.maximum(update, _STATISTIC_FLOOR))), mask=exists)
    tl.store(unit_ptr + NUM_CONSTANTS + 1, _clipped(_log10(tl.maximum(crest, _STATISTIC_FLOOR))), mask=exists)
    tl.store(unit_ptr + NUM_CONSTANTS + 2, widths / _WIDTH_SCALE, mask=exists)
    depth = tl.load(depth_ptr + unit, mask=exists, other=0.0)
    tl.store(unit_ptr + NUM_CONSTANTS + 3, depth, mask=exists)
