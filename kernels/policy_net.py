"""The policy network in one kernel: from the signals to the int32 widths that the products read, all on the device."""
# Kernel functions are Triton's own dialect; the launcher above them is checked.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexquant_rl.kernels.launching import check_tensor, jit, next_power_of_two, require_triton, tl

_LAYERS = ("encode_global.0", "encode_unit.0", "encode_unit.2", "width_head")


@dataclass(frozen=True, eq=False)
class PolicyWeights:
    """The tensors of a `PrecisionNet` (engine/control/policy.py) that choose widths, on one device, float32.

    Attributes:
        tensors: Mean, deviation, then weight and bias of the global encoder, both layers of the unit
            encoder and the head.
        bit_widths: `[V]` int32, the width that each score stands for.
        num_global: G, signals of the token.
        num_per_unit: F, signals of a unit.
        num_hidden: Size of the hidden layers, a power of two.
    """

    tensors: tuple[Tensor, ...]
    bit_widths: Tensor
    num_global: int
    num_per_unit: int
    num_hidden: int

    @staticmethod
    def from_state_dict(
        state: Mapping[str, Tensor], bit_widths: Sequence[int], *, device: torch.device | str
    ) -> PolicyWeights:
        """Takes what the kernel needs of a network's state dict; the value head is left out.

        Raises:
            ValueError: If a tensor is missing or has another shape.
        """
        names = ("mean", "std", *(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")))
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"the state dict has no {missing[0]}; pass that of a PrecisionNet")
        tensors = tuple(state[name].detach().to(device, torch.float32).contiguous() for name in names)
        num_hidden, num_global = tensors[2].shape
        num_per_unit = tensors[4].shape[1] - num_hidden
        if num_hidden != next_power_of_two(num_hidden):
            raise ValueError(f"the network has {num_hidden} hidden units but the kernel needs a power of two")
        num_widths = len(bit_widths)
        shapes: tuple[tuple[int, ...], ...] = (
            (num_global + num_per_unit,),
            (num_global + num_per_unit,),
            (num_hidden, num_global),
            (num_hidden,),
            (num_hidden, num_per_unit + num_hidden),
            (num_hidden,),
            (num_hidden, num_hidden),
            (num_hidden,),
            (num_widths, num_hidden),
            (num_widths,),
        )
        for name, tensor, shape in zip(names, tensors, shapes, strict=True):
            check_tensor(name, tensor, dtype=torch.float32, shape=shape, device=tensors[0].device)
        widths = torch.tensor(list(bit_widths), dtype=torch.int32, device=device)
        return PolicyWeights(tensors, widths, num_global, num_per_unit, num_hidden)


def choose_widths(
    weights: PolicyWeights, signals: Tensor, *, num_units: int, out: Tensor | None = None, logits: Tensor | None = None
) -> Tensor:
    """Runs the network and takes the best-scored width of every unit, the narrower one if two score the same.

    One program per unit; each encodes the token's signals for itself, which is cheaper than a second launch. Never
    synchronises; with `out` given it allocates nothing.

    Shapes: B sequences, G token signals, U units, F signals of a unit, V stored widths.

    Args:
        weights: The network.
        signals: `[B, G + U * F]` float32 on the device.
        num_units: U.
        out: `[B, U]` int32; allocated if not given.
        logits: `[B, U, V]` float32, filled with the scores if given.

    Returns:
        Bit-widths: `out`, or a new tensor.

    Raises:
        ValueError: If a tensor has another dtype, shape, device or stride.
        RuntimeError: If Triton is not installed.
    """
    device = signals.device
    require_triton(device)
    dim = weights.num_global + num_units * weights.num_per_unit
    check_tensor("signals", signals, dtype=torch.float32, shape=(-1, dim), device=device)
    check_tensor("bit_widths", weights.bit_widths, dtype=torch.int32, shape=(-1,), device=device)
    if num_units < 1:
        raise ValueError(f"num_units={num_units} must be at least 1")
    num_rows, num_widths = signals.shape[0], weights.bit_widths.numel()
    if out is None:
        out = torch.empty(num_rows, num_units, dtype=torch.int32, device=device)
    check_tensor("out", out, dtype=torch.int32, shape=(num_rows, num_units), device=device)
    if logits is not None:
        check_tensor("logits", logits, dtype=torch.float32, shape=(num_rows, num_units, num_widths), device=device)
    _policy_kernel[(num_rows, num_units)](
        signals,
        *weights.tensors,
        weights.bit_widths,
        out,
        signals if logits is None else logits,
        num_units,
        NUM_GLOBAL=weights.num_global,
        NUM_PER_UNIT=weights.num_per_unit,
        NUM_HIDDEN=weights.num_hidden,
        NUM_WIDTHS=num_widths,
        HAS_LOGITS=logits is not None,
        BLOCK_GLOBAL=next_power_of_two(weights.num_global),
        BLOCK_UNIT=next_power_of_two(weights.num_per_unit),
        BLOCK_WIDTHS=next_power_of_two(num_widths),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


@jit()
def _tanh(x):
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@jit()
def _matrix_vector(
    x,
    weight_ptr,
    row_stride,
    NUM_OUT: tl.constexpr,
    NUM_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """`[BLOCK_OUT, BLOCK_IN] @ [BLOCK_IN]`; rows and columns beyond the matrix are 0."""
    row = tl.arange(0, BLOCK_OUT)[:, None]
    column = tl.arange(0, BLOCK_IN)[None, :]
    exists = (row < NUM_OUT) & (column < NUM_IN)
    weight = tl.load(weight_ptr + row * row_stride + column, mask=exists, other=0.0)
    return tl.sum(weight * x[None, :], axis=1)


@jit()
def _load_signals(signals_ptr, mean_ptr, std_ptr, NUM: tl.constexpr, BLOCK: tl.constexpr):
    """Loads and standardises NUM signals; 0 beyond them."""
    index = tl.arange(0, BLOCK)
    exists = index < NUM
    x = tl.load(signals_ptr + index, mask=exists, other=0.0)
    mean = tl.load(mean_ptr + index, mask=exists, other=0.0)
    std = tl.load(std_ptr + index, mask=exists, other=1.0)
    return (x - mean) / std


@jit(do_not_specialize=["num_units"], do_not_specialize_on_alignment=["signals_ptr", "out_ptr", "logits_ptr"])
def _policy_kernel(
    signals_ptr,
    mean_ptr,
    std_ptr,
    global_weight_ptr,
    global_bias_ptr,
    first_weight_ptr,
    first_bias_ptr,
    second_weight_ptr,
    second_bias_ptr,
    head_weight_ptr,
    head_bias_ptr,
    bit_widths_ptr,
    out_ptr,
    logits_ptr,
    num_units,
    NUM_GLOBAL: tl.constexpr,
    NUM_PER_UNIT: tl.constexpr,
    NUM_HIDDEN: tl.constexpr,
    NUM_WIDTHS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    BLOCK_GLOBAL: tl.constexpr,
    BLOCK_UNIT: tl.constexpr,
    BLOCK_WIDTHS: tl.constexpr,
):
    sequence = tl.program_id(0)
    unit = tl.program_id(1)
    row_ptr = signals_ptr + sequence.to(tl.int64) * (NUM_GLOBAL + num_units * NUM_PER_UNIT)
    global_signals = _load_signals(row_ptr, mean_ptr, std_ptr, NUM_GLOBAL, BLOCK_GLOBAL)
    unit_signals = _load_signals(
        row_ptr + NUM_GLOBAL + unit * NUM_PER_UNIT,
        mean_ptr + NUM_GLOBAL,
        std_ptr + NUM_GLOBAL,
        NUM_PER_UNIT,
        BLOCK_UNIT,
    )
    hidden = tl.arange(0, NUM_HIDDEN)
    context = _tanh(
        _matrix_vector(global_signals, global_weight_ptr, NUM_GLOBAL, NUM_HIDDEN, NUM_GLOBAL, NUM_HIDDEN, BLOCK_GLOBAL)
        + tl.load(global_bias_ptr + hidden)
    )
    stride: tl.constexpr = NUM_PER_UNIT + NUM_HIDDEN
    first = _tanh(
        _matrix_vector(unit_signals, first_weight_ptr, stride, NUM_HIDDEN, NUM_PER_UNIT, NUM_HIDDEN, BLOCK_UNIT)
        + _matrix_vector(
            context, first_weight_ptr + NUM_PER_UNIT, stride, NUM_HIDDEN, NUM_HIDDEN, NUM_HIDDEN, NUM_HIDDEN
        )
        + tl.load(first_bias_ptr + hidden)
    )
    second = _tanh(
        _matrix_vector(first, second_weight_ptr, NUM_HIDDEN, NUM_HIDDEN, NUM_HIDDEN, NUM_HIDDEN, NUM_HIDDEN)
        + tl.load(second_bias_ptr + hidden)
    )
    width_idx = tl.arange(0, BLOCK_WIDTHS)
    is_stored = width_idx < NUM_WIDTHS
    scores = _matrix_vector(second, head_weight_ptr, NUM_HIDDEN, NUM_WIDTHS, NUM_HIDDEN, BLOCK_WIDTHS, NUM_HIDDEN)
    scores += tl.load(head_bias_ptr + width_idx, mask=is_stored, other=0.0)
    target = sequence.to(tl.int64) * num_units + unit
    if HAS_LOGITS:
        tl.store(logits_ptr + target * NUM_WIDTHS + width_idx, scores, mask=is_stored)
    best = tl.argmax(tl.where(is_stored, scores, float("-inf")), axis=0, tie_break_left=True)
    tl.store(out_ptr + target, tl.load(bit_widths_ptr + best))
