"""GPTQ for nested weights: one code per weight that serves every stored width, fitted to a calibration text.

The objective is the error of the outputs summed over the stored widths, ``Σ_b λ_b tr((W - W_b) H (W - W_b)ᵀ)`` with
``W_b = scale_b * (code >> (8 - b)) + offset_b`` and H the second moments of the inputs. Column by column, the code that
costs the least over all widths is taken and the error of *each width* is made up for in that width's own remaining
targets. (A single target for all widths, which gets the mean error, is what MatGPTQ does; docs/weights.md compares.)
Sweeps of coordinate descent over the codes follow, which GPTQ has not, and a refit of scales and offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.quantize import check_format, check_range, check_weight, check_width_weights
from flexquant_rl.engine.quantisation.refit import damped_hessian, refit_pairs
from flexquant_rl.kernels.bitplane import NUM_PLANES, NestedWeight, pack_codes, padded_inputs
from flexquant_rl.kernels.code_search import CodeSearch, can_search
from flexquant_rl.kernels.native import choose_isa
from flexquant_rl.kernels.reference import dequantize

_MAX_CODE = 2**NUM_PLANES - 1
# The error of a width counts twice as much as that of a width with one bit less. It falls fourfold with every bit, so
# low widths still weigh more; with fourfold weights they gain little, with equal ones the high widths lose.
_WEIGHT_PER_BIT = 2.0
_NUM_SWEEPS = 3
# The search for the best code looks at this many codes around the mean of the widths' wishes, and at four cells of the
# second widest width at least. No wider search has found a better code.
_SEARCHED_CODES, _SEARCHED_CELLS = 32, 4
# Numbers of one temporary: bounds memory for any matrix.
_CHUNK_NUMBERS = 1 << 24


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    group_size: int = 128,
    bit_widths: tuple[int, ...] = (3, 4, 5, 6, 8),
    width_weights: tuple[float, ...] = (),
    num_sweeps: int = _NUM_SWEEPS,
    name: str = "weight",
) -> NestedWeight:
    """Quantises a weight for the inputs that it gets.

    Works in the precision of `weight`, but for the factorisation and the last refit, which are in float64.

    Shapes: N output features, K input features, V stored widths.

    Args:
        weight: `[N, K]` floating point, finite, any device.
        hessian: `[K, K]`, mean of ``x xᵀ`` over the tokens of a calibration text; inputs that were always zero are
            rounded to nearest.
        group_size: Consecutive inputs that share a scale and an offset: 32, 64 or 128. It need not divide K.
        bit_widths: Widths to store, ascending, the last is 8.
        width_weights: How much the error of each width counts; default: doubles with every bit.
        num_sweeps: Sweeps of coordinate descent over the codes.
        name: What error messages call the weight.

    Returns:
        The nested weight, on the device of `weight`.

    Raises:
        InputError: If an option is outside its domain, weight or hessian are not finite or of the wrong shape, or
            float16 scales and offsets cannot represent the weight.

    References:
        GPTQ, arXiv:2210.17323, algorithm 1. MatGPTQ, github.com/IST-DASLab/MatGPTQ, for the sum over widths.
    """
    check_format(group_size, bit_widths)
    check_weight(weight, name)
    num_outputs, num_inputs = weight.shape
    work = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    damped = damped_hessian(hessian.to(weight.device), num_inputs, name)
    problem = _Problem(
        damped.to(work.dtype), _inverse_factor(damped).to(work.dtype), _importance(bit_widths, width_weights, work)
    )
    num_padded = padded_inputs(num_inputs)
    codes = torch.zeros(num_outputs, num_padded, dtype=torch.uint8, device=weight.device)
    pair_shape = (len(bit_widths), num_outputs, num_padded // group_size)
    scale = torch.zeros(pair_shape, dtype=torch.float16, device=weight.device)
    offset = torch.zeros(pair_shape, dtype=torch.float16, device=weight.device)
    num_rows = max(1, _CHUNK_NUMBERS // (num_inputs * len(bit_widths)))
    for start in range(0, num_outputs, num_rows):
        rows = slice(start, start + num_rows)
        chunk = _Chunk(work[rows], problem, bit_widths, group_size)
        chunk.feed_back()
        chunk.descend(num_sweeps)
        codes[rows, :num_inputs] = chunk.codes.T.to(torch.uint8)
        num_groups = len(chunk.grids)
        scale[:, rows, :num_groups] = torch.stack([grid.scale for grid in chunk.grids], dim=-1).half()
        offset[:, rows, :num_groups] = torch.stack([grid.offset for grid in chunk.grids], dim=-1).half()
    used = (..., slice(0, -(-num_inputs // group_size)))
    scale[used], offset[used] = refit_pairs(
        work,
        codes[:, :num_inputs],
        scale[used],
        offset[used],
        damped,
        bit_widths=tuple(bit_widths),
        group_size=group_size,
    )
    nested = NestedWeight(pack_codes(codes), scale, offset, tuple(bit_widths), group_size, num_inputs)
    check_range(weight, scale, offset, _energy(work, nested, problem.hessian, num_rows), name)
    return nested


def _energy(weight: Tensor, nested: NestedWeight, hessian: Tensor, num_rows: int) -> Tensor:
    """Squared error at 8 bits and squared weight, both as the outputs see them: `[2]` float64."""
    energy = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), num_rows):
        part = slice(start, start + num_rows)
        rows = weight[part].to(hessian.dtype)
        for index, values in enumerate((rows - dequantize(nested.rows(part), bit_width=NUM_PLANES), rows)):
            energy[index] += ((values @ hessian) * values).sum(dtype=torch.float64)
    return energy


def _importance(bit_widths: tuple[int, ...], width_weights: tuple[float, ...], like: Tensor) -> Tensor:
    """The λ of each width, `[V]`, in the dtype and on the device of `like`; they sum to 1."""
    if not width_weights:
        width_weights = tuple(_WEIGHT_PER_BIT**bit_width for bit_width in bit_widths)
    check_width_weights(width_weights, bit_widths)
    weights = like.new_tensor(width_weights)
    return weights / weights.sum()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``inv(H) = Uᵀ U``, float64: row j tells how later inputs make up for an error in j.

    With rows and columns in reverse order H is ``L Lᵀ``. U is the inverse of L, put back in order.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return factor.contiguous()  # it comes by columns, and is walked by rows


@dataclass(frozen=True, eq=False)
class _Problem:
    """What all rows share. hessian: `[K, K]`; factor: `_inverse_factor` of it; importance: `[V]`, λ of each width."""

    hessian: Tensor
    factor: Tensor
    importance: Tensor


class Grid:
    """The values that the codes of one group stand for.

    Args:
        scale: `[V, n]`, float16 values.
        offset: `[V, n]`, float16 values.
        bit_widths: The V widths.
        importance: `[V]`.
    """

    def __init__(self, scale: Tensor, offset: Tensor, bit_widths: tuple[int, ...], importance: Tensor) -> None:
        self.scale, self.offset = scale, offset
        self._bit_widths = bit_widths
        self._num_searched = 1
        self._codes_per_cell = scale.new_tensor([2.0 ** (NUM_PLANES - bit_width) for bit_width in bit_widths])[:, None]
        self._steps_per_value = torch.where(scale > 0, 1 / scale, 0.0)
        self._cost = importance[:, None] * scale.square()
        wish = self._cost / self._codes_per_cell.square()
        total = wish.sum(0)
        self._wish_shares = wish / torch.where(total > 0, total, 1.0)
        if len(bit_widths) > 1:
            self._cell = 2 ** (NUM_PLANES - bit_widths[-2])
            self._num_cells = 2 ** bit_widths[-2]
            self._num_searched = min(self._num_cells, max(_SEARCHED_CELLS, _SEARCHED_CODES // self._cell))
            self._searched = torch.arange(self._num_searched, dtype=scale.dtype, device=scale.device)[:, None]
            self._cells_per_cell = (self._cell / self._codes_per_cell[:-1])[..., None]

    def decode(self, codes: Tensor) -> Tensor:
        """Values of integral codes `[..., 1, n]` or `[n]` at every width, `[..., V, n]`."""
        return (codes / self._codes_per_cell).floor_().mul_(self.scale).add_(self.offset)

    def nearest(self, targets: Tensor) -> Tensor:
        """The codes `[n]` that minimise the weighted squared distance of their values from `targets [V, n]`.

        Codes are integral numbers in the dtype of the targets. Candidates are cells of the second widest width; the
        best code inside each is known, because only the widest width tells its codes apart.
        """
        steps = (targets - self.offset).mul_(self._steps_per_value)
        widest = steps[-1].round()
        if len(steps) == 1:
            return widest.clamp_(0, _MAX_CODE)
        # Where each width would put the code, as the 8-bit code in the middle of its cell.
        wishes = (steps + 0.5).mul_(self._codes_per_cell).sub_(0.5)
        centre = (wishes * self._wish_shares).sum(0)
        first = ((centre + 0.5) / self._cell - len(self._searched) / 2).round_()
        cells = self._searched + first.clamp_(0, self._num_cells - len(self._searched))  # [C, n]
        distances = steps[:-1, None] - (cells * self._cells_per_cell).floor_()  # [V - 1, C, n]
        cost = distances.square_().mul_(self._cost[:-1, None]).sum(0)
        low = cells * self._cell
        codes = torch.minimum(torch.maximum(widest, low), low + (self._cell - 1))
        cost += (steps[-1] - codes).square_().mul_(self._cost[-1])
        return codes.gather(0, cost.argmin(0, keepdim=True))[0]

    def feed_back(self, targets: Tensor, codes: Tensor, factor: Tensor) -> None:
        """Chooses the codes `[g, n]` of the group, first input to last; later targets make up for the errors.

        Args:
            targets: `[g, V, n]`, replaced by the errors over the diagonal of the factor.
            codes: Where the codes go.
            factor: `[g, g]`, the group's part of `_inverse_factor`.
        """
        if can_search(targets):
            self._native.feed_back(targets, codes, factor)
        else:
            self.feed_back_in_torch(targets, codes, factor)

    def feed_back_in_torch(self, targets: Tensor, codes: Tensor, factor: Tensor) -> None:
        """The definition of `feed_back`, for any device and precision."""
        for j in range(len(targets)):
            codes[j] = self.nearest(targets[j])
            error = (targets[j] - self.decode(codes[j])) / factor[j, j]
            targets[j + 1 :].flatten(1).addr_(factor[j, j + 1 :], error.flatten(), alpha=-1)
            targets[j] = error

    def descend(self, weight: Tensor, errors: Tensor, slopes: Tensor, codes: Tensor, hessian: Tensor) -> None:
        """Chooses every code `[g, n]` of the group once more, given all the others.

        Args:
            weight: `[g, n]`.
            errors: `[g, V, n]`, weight less what the codes stand for; kept up to date.
            slopes: `[g, V, n]`, hessian times the errors of all inputs; overwritten.
            codes: The codes; replaced.
            hessian: `[g, g]`, the group's part of the hessian.
        """
        if can_search(weight):
            self._native.descend(weight, errors, slopes, codes, hessian)
        else:
            self.descend_in_torch(weight, errors, slopes, codes, hessian)

    def descend_in_torch(self, weight: Tensor, errors: Tensor, slopes: Tensor, codes: Tensor, hessian: Tensor) -> None:
        """The definition of `descend`, for any device and precision."""
        for j in range(len(weight)):
            decoded = weight[j] - errors[j]
            codes[j] = self.nearest(decoded + slopes[j] / hessian[j, j])
            step = decoded - self.decode(codes[j])
            errors[j] += step
            slopes.flatten(1).addr_(hessian[:, j], step.flatten())

    @cached_property
    def _native(self) -> CodeSearch:
        """The search over these pairs, which serves every sweep."""
        grids = torch.stack([self.scale, self.offset, self._steps_per_value, self._cost, self._wish_shares])
        try:
            isa = choose_isa(None)
        except ValueError as error:  # a body that this machine lacks was asked for by name
            raise InputError(str(error)) from error
        return CodeSearch(grids, self._bit_widths, self._num_searched, isa=isa)


class _Chunk:
    """Some rows of a weight on their way to codes; everything is stored by input, `[K, ...]`, as it is walked.

    Args:
        weight: `[n, K]`.
        problem: What it shares with the other rows.
        bit_widths: The V widths.
        group_size: Consecutive inputs that share a grid.
    """

    def __init__(self, weight: Tensor, problem: _Problem, bit_widths: tuple[int, ...], group_size: int) -> None:
        self.grids: list[Grid] = []
        self._problem = problem
        self._bit_widths = bit_widths
        num_rows, num_inputs = weight.shape
        self._weight = weight.T.contiguous()
        self.codes = torch.zeros_like(self._weight)  # [K, n]
        self._shape = (num_inputs, len(bit_widths), num_rows)
        self._groups = [slice(start, min(start + group_size, num_inputs)) for start in range(0, num_inputs, group_size)]

    def feed_back(self) -> None:
        """Chooses grids and codes from the first input to the last, each width making up for its own errors."""
        factor = self._problem.factor
        targets = self._weight[:, None].repeat(1, self._shape[1], 1)  # [K, V, n], a copy even for one width
        for group in self._groups:
            block = targets[group]
            grid = self._fit_grid(block, factor.diagonal()[group].square().reciprocal())
            self.grids.append(grid)
            grid.feed_back(block, self.codes[group], factor[group, group])
            targets[group.stop :].flatten(1).addmm_(factor[group, group.stop :].T, block.flatten(1), alpha=-1)

    def descend(self, num_sweeps: int) -> None:
        """Chooses every code so many times more, given all the others: the objective never rises."""
        if not num_sweeps:
            return
        hessian = self._problem.hessian
        errors = torch.empty(self._shape, dtype=self.codes.dtype, device=self.codes.device)
        for group, grid in zip(self._groups, self.grids, strict=True):
            torch.sub(self._weight[group, None], grid.decode(self.codes[group, None]), out=errors[group])
        for _ in range(num_sweeps):
            for group, grid in zip(self._groups, self.grids, strict=True):
                slopes = (hessian[group] @ errors.flatten(1)).view(-1, *self._shape[1:])
                grid.descend(self._weight[group], errors[group], slopes, self.codes[group], hessian[group, group])

    def _fit_grid(self, targets: Tensor, importance: Tensor) -> Grid:
        """Rounds the mean target of a group to nearest and fits each width's pair to its own, `targets [g, V, n]`.

        Args:
            targets: What is left to be represented.
            importance: `[g]`, what a squared error of each input costs once later inputs have made up for it.
        """
        mean = (targets * self._problem.importance[:, None]).sum(1)
        low = mean.amin(0)
        span = mean.amax(0) - low
        codes = ((mean - low) / torch.where(span > 0, span, 1.0)).mul_(_MAX_CODE + 1).floor_().clamp_(max=_MAX_CODE)
        shares = (importance / importance.sum())[:, None]
        scales, offsets = [], []
        for width_idx, bit_width in enumerate(self._bit_widths):
            q = (codes / 2 ** (NUM_PLANES - bit_width)).floor_()
            height = targets[:, width_idx] - low  # a large common offset must not cancel the digits of the weights
            mean_q, mean_height = (q * shares).sum(0), (height * shares).sum(0)
            q -= mean_q
            variance = (q.square() * shares).sum(0)
            slope = (q * height * shares).sum(0) / torch.where(variance > 0, variance, 1.0)
            scales.append(slope.clamp_min(0).half().to(mean.dtype))
            offsets.append((low + mean_height - scales[-1] * mean_q).half().to(mean.dtype))
        return Grid(torch.stack(scales), torch.stack(offsets), self._bit_widths, self._problem.importance)
