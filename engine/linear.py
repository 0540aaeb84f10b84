"""Linear layers over nested weights, and the call-scoped argument that tells them which bits to read.

Hugging Face modules do not pass extra arguments down to their linears, so the bit-widths of a call travel in a
`ContextVar` holding a `WidthPlan`. It is set for the duration of one forward pass and reset by `with`, whatever happens
in between: no module ever *has* a bit-width, and an exception cannot leave a model at the wrong one. A call outside any
plan, as of a model in somebody else's hands, reads the largest width.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexquant_rl.engine.errors import InputError
from flexquant_rl.kernels import reference
from flexquant_rl.kernels.bitplane import NestedWeight
from flexquant_rl.kernels.signal_constants import NORM_FLOOR

if TYPE_CHECKING:  # serving imports this module, and must not pull in transformers with it
    from transformers.pytorch_utils import Conv1D

_MIN_CACHE_BYTES, _MAX_CACHE_BYTES = 2 << 30, 8 << 30

REFERENCE_WIDTH = 0
"""Stands for the unquantised weights wherever a bit-width is expected."""
CONV1D = "transformers.pytorch_utils.Conv1D"
"""The class of GPT-2's linears, by name: an import of it would pull in transformers."""


class _UnitGroups:
    """The tokens of one call sorted by the width that one unit reads for them."""

    def __init__(self, widths: Tensor) -> None:
        first = int(widths[0])
        self.order: Tensor | None = None
        self.runs: list[tuple[int, int]] = [(first, len(widths))]  # (bit-width, number of tokens)
        if bool((widths != first).any()):
            ordered, self.order = torch.sort(widths, stable=True)
            values, counts = torch.unique_consecutive(ordered, return_counts=True)
            self.runs = list(zip(values.tolist(), counts.tolist(), strict=True))


class WidthPlan:
    """Which tokens of a forward pass read which width, unit by unit; also collects the layers' statistics.

    Args:
        body_widths: `[num_tokens, num_body_units]` int64, tokens in the row-major order of the input.
        head_widths: `[num_kept_tokens]` int64 for the lm_head's unit, or None where the head is not a unit.
        collect: Last tokens of each row at which layer statistics are taken; 0 takes none.
    """

    def __init__(self, body_widths: Tensor, head_widths: Tensor | None, *, collect: int) -> None:
        columns = [*body_widths.cpu().unbind(1)]
        if head_widths is not None:
            columns.append(head_widths.cpu())
        self._groups = [_UnitGroups(column) for column in columns]
        self.collect = collect
        self.residual_update: dict[int, Tensor] = {}
        self.crest: dict[int, Tensor] = {}

    def groups(self, unit_idx: int, inputs: Tensor) -> _UnitGroups:
        """The grouping of one unit, asked for by each of its linears with what it reads, `[..., K]`."""
        return self._groups[unit_idx]

    def observe_layer(self, layer_idx: int, before: Tensor, after: Tensor) -> None:
        """Records ‖Δh‖/‖h‖ and max|h|/rms(h) at the last tokens of each row; `before`, `after`: `[R, T, d]`."""
        last, out = before[:, -self.collect :].float(), after[:, -self.collect :].float()
        norm = last.norm(dim=-1).clamp_min(NORM_FLOOR)
        self.residual_update[layer_idx] = (out - last).norm(dim=-1) / norm
        self.crest[layer_idx] = last.abs().amax(dim=-1) * last.shape[-1] ** 0.5 / norm


class InFlightPlan(WidthPlan):
    """Widths that are chosen during the pass: those of a unit when the first of its linears is called.

    Args:
        choose: Index of a unit and what its first linear reads, `[n, K]` -> widths `[n]` int64. The tokens are in the
            row-major order of the input; the head's are the kept ones.
    """

    def __init__(self, choose: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(torch.empty(0, 0, dtype=torch.int64), None, collect=0)
        self._choose = choose
        self._chosen: dict[int, _UnitGroups] = {}

    def groups(self, unit_idx: int, inputs: Tensor) -> _UnitGroups:
        """See `WidthPlan.groups`."""
        if unit_idx not in self._chosen:
            self._chosen[unit_idx] = _UnitGroups(self._choose(unit_idx, inputs.flatten(0, -2)).cpu())
        return self._chosen[unit_idx]


_ACTIVE_PLAN: ContextVar[WidthPlan | None] = ContextVar("flexquant_rl_width_plan", default=None)


@contextmanager
def reading(plan: WidthPlan) -> Iterator[WidthPlan]:
    """Makes `plan` the argument of every `NestedLinear` called inside the block."""
    token = _ACTIVE_PLAN.set(plan)
    try:
        yield plan
    finally:
        _ACTIVE_PLAN.reset(token)


def active_plan() -> WidthPlan | None:
    """The plan of the forward pass under way, if any."""
    return _ACTIVE_PLAN.get()


def layer_hook(layer_idx: int) -> Callable[..., None]:
    """A forward hook that records the statistics of a decoder layer in the active plan, if that collects them."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        plan = active_plan()
        if plan is not None and plan.collect:
            before = args[0] if args else kwargs["hidden_states"]
            plan.observe_layer(layer_idx, before, output[0] if isinstance(output, tuple) else output)

    return hook


def logits_under(
    plan: WidthPlan,
    hf_model: Callable[..., Any],
    token_ids: Tensor,
    *,
    keep: int,
    cache: Any = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Calls a Hugging Face model whose nested linears read a plan; `[R, keep, vocab]` float32.

    Args:
        plan: Widths, and what is collected.
        hf_model: The model.
        token_ids: `[R, T]` int64.
        keep: Logits are computed for the last `keep` tokens of each row.
        cache: Keys and values so far, or None for a pass that keeps nothing.
        positions: `[R, T]` int64, with `cache`.
        mask: Additive `[R, 1, T, end]`, with `cache`.
    """
    with reading(plan):
        output = hf_model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
    logits: Tensor = output.logits
    return logits.float()


def is_conv1d(module: nn.Module) -> TypeGuard[Conv1D]:
    """Whether a module is GPT-2's linear, whose matrix is transposed; does not import it."""
    return any(f"{kind.__module__}.{kind.__name__}" == CONV1D for kind in type(module).__mro__)


def is_dense(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a linear that can be nested."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def dense_matrix(linear: nn.Module) -> Tensor:
    """The weights of a linear that is not nested, `[N, K]` float32, contiguous."""
    assert is_dense(linear)
    matrix = linear.weight.detach().float()
    return matrix.T.contiguous() if is_conv1d(linear) else matrix


def reference_matrix(linear: nn.Module) -> Tensor:
    """A copy of them by columns, as `DenseCache` keeps others; a tied embedding no longer shares its storage."""
    return dense_matrix(linear).t().clone(memory_format=torch.contiguous_format).t()


def dense_cache_bytes() -> int:
    """Default cap on dequantised matrices kept by one model: half of this machine's memory, 2 to 8 GiB.

    Rows of a batch at different widths read all widths of all matrices in turn. Those that do not fit are decoded again
    at every use, which takes many times as long as the product.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        memory = 0
    return min(max(memory // 2, _MIN_CACHE_BYTES), _MAX_CACHE_BYTES)


class DenseCache:
    """Keeps dequantised matrices, up to a number of bytes.

    Where a new one does not fit, the least recently used goes, as long as it is out of use. Decode steps ask for all
    matrices in turn, and then the least recently used is the next to be asked for: of a working set that is a little
    above the cap nothing would ever be found. So what comes back sooner than everything else has, in number of
    requests, takes the place of the most recently used, which is the last to come back.

    Args:
        max_bytes: Cap on the sum of the kept matrices; the one just asked for is always kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[int, int], Tensor] = OrderedDict()  # the least recently used first
        self._asked_at: dict[tuple[int, int], int] = {}  # the last request for each, kept or not
        self._num_requests = 0
        self._bytes = 0
        self._lock = threading.Lock()  # sessions of one model may run in several threads

    def get(self, linear: NestedLinear, bit_width: int) -> Tensor:
        """Returns the float32 `[N, K]` matrix of a linear at a width."""
        key = (id(linear), bit_width)
        with self._lock:
            before = self._asked_at.get(key)
            self._asked_at[key] = self._num_requests
            self._num_requests += 1
            matrix = self._entries.get(key)
            if matrix is not None:
                self._entries.move_to_end(key)
                return matrix
            matrix = _decoded(linear.weight, bit_width)
            while self._entries and self._bytes + matrix.nbytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=self._all_asked_since(before))
                self._bytes -= dropped.nbytes
            self._entries[key] = matrix
            self._bytes += matrix.nbytes
            return matrix

    def _all_asked_since(self, request: int | None) -> bool:
        """Whether every kept matrix was asked for after a request; None: there was no such request."""
        return request is not None and self._asked_at[next(iter(self._entries))] > request

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseCache:
        """The cache of a copied model: its linears are others."""
        twin = memo[id(self)] = DenseCache(self.max_bytes)
        return twin

    def clear(self) -> None:
        """Forgets everything, e.g. after the model moved to another device."""
        with self._lock:
            self._entries.clear()
            self._asked_at.clear()
            self._bytes = 0


def _decoded(weight: NestedWeight, bit_width: int) -> Tensor:
    """The float32 `[N, K]` matrix of a weight, decoded where it is."""
    # The kernel does not go below the stored widths.
    if _has_kernel(weight.planes.device) and bit_width >= weight.bit_widths[0]:
        with torch.cuda.device_of(weight.planes):  # Triton launches on the current device
            width = torch.full((1,), bit_width, dtype=torch.int32, device=weight.planes.device)
            from flexquant_rl.kernels import dequantize as device_kernel  # here, not above: as in _has_kernel

            return device_kernel.dequantize(weight, width, dtype=torch.float32)
    # Stored by columns: a matrix product of few tokens runs up to twice as fast that way round on a CPU.
    return reference.dequantize(weight, bit_width=bit_width).t().contiguous().t()


def _has_kernel(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # Here, not above: Triton takes a quarter of a second, and a CPU needs none of it.
    from flexquant_rl.kernels import launching

    return launching.why_not_triton(device) is None


class NestedLinear(nn.Module):
    """`y = x @ W_b.T + bias`, where each token's b comes from the active `WidthPlan`; without one it is the largest.

    Args:
        weight: The stored bitplanes.
        bias: `[N]` or None.
        unit_idx: The unit whose width this linear reads.
        cache: Dequantised matrices, shared by the whole model.
        reference_weight: `[N, K]` float32 unquantised weights, read at width `REFERENCE_WIDTH`; None where not kept.
    """

    planes: Tensor
    scale: Tensor
    offset: Tensor
    bias: Tensor | None
    reference_weight: Tensor | None

    def __init__(
        self,
        weight: NestedWeight,
        bias: Tensor | None,
        *,
        unit_idx: int,
        cache: DenseCache,
        reference_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("planes", weight.planes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("bias", bias)
        self.register_buffer("reference_weight", reference_weight, persistent=False)
        self.bit_widths = weight.bit_widths
        self.group_size = weight.group_size
        self.num_inputs = weight.num_inputs
        self.unit_idx = unit_idx
        self.cache = cache

    @property
    def weight(self) -> NestedWeight:
        """The stored weight on the device where the buffers are now."""
        return NestedWeight(self.planes, self.scale, self.offset, self.bit_widths, self.group_size, self.num_inputs)

    def dense(self, bit_width: int) -> Tensor:
        """The `[N, K]` float32 matrix that `bit_width` stands for."""
        if bit_width != REFERENCE_WIDTH:
            return self.cache.get(self, bit_width)
        if self.reference_weight is None:
            raise InputError(
                "the unquantised weights were asked for (width 0), but this model holds nested weights only; "
                "compare against its largest width, or load the original model"
            )
        return self.reference_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedLinear:
        """Moves the buffers, as `nn.Module.to` has it; dequantised copies of where they were are dropped.

        Raises:
            InputError: If the call is for another dtype.
        """
        if fn(self.scale.new_empty(0)).dtype != self.scale.dtype:
            raise InputError(
                "a nested model computes in float32 from float16 scales, and cannot be cast to another dtype; load it "
                "again and leave `.to(dtype)` and `.half()` out"
            )
        self.cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies; `x`: `[..., K]` float32 -> `[..., N]`, tokens in the order of the active plan."""
        plan = _ACTIVE_PLAN.get()
        if plan is None:
            return F.linear(x, self.dense(self.bit_widths[-1]), self.bias)
        groups = plan.groups(self.unit_idx, x)
        if groups.order is None:
            return F.linear(x, self.dense(groups.runs[0][0]), self.bias)
        flat = x.reshape(-1, self.num_inputs)
        gathered = flat.index_select(0, groups.order.to(x.device))
        out_sorted = torch.cat(
            [
                F.linear(tokens, self.dense(bit_width), self.bias)
                for tokens, (bit_width, _) in zip(gathered.split([n for _, n in groups.runs]), groups.runs, strict=True)
            ]
        )
        out = torch.empty_like(out_sorted)
        out.index_copy_(0, groups.order.to(x.device), out_sorted)
        return out.view(*x.shape[:-1], out.shape[-1])
