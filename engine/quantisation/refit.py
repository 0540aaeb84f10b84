"""Scales and offsets that minimise the error of a linear's outputs over the inputs of a calibration text."""

import torch
from torch import Tensor

from flexquant_rl.engine.errors import InputError
from flexquant_rl.kernels.bitplane import NUM_PLANES, derive_scale_and_offset

# Share of the mean energy of the inputs that is added to each: keeps the problem well-posed where the text says
# little, e.g. nothing at all about an input that was always zero.
_DAMPING = 0.01
_NUM_SWEEPS = 6
# Float64 numbers of one temporary: bounds memory for any matrix.
_CHUNK_NUMBERS = 1 << 23


def damped_hessian(hessian: Tensor, num_inputs: int, name: str) -> Tensor:
    """Makes the second moments of a linear's inputs positive definite.

    Args:
        hessian: `[K, K]`, mean of ``x xᵀ`` over tokens.
        num_inputs: K of the weight.
        name: What error messages call the weight.

    Returns:
        `[K, K]` float64; the identity where the inputs were always zero.

    Raises:
        InputError: If the shape is wrong or a value is NaN or infinite.
    """
    if hessian.shape != (num_inputs, num_inputs):
        raise InputError(
            f"{name} has {num_inputs} inputs, but their second moments are {list(hessian.shape)}; "
            "calibrate with the model that is quantised"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise InputError(
            f"{name} gets NaN or infinite inputs from the calibration text, which must be finite; "
            "use other text or repair the checkpoint"
        )
    damped = (hessian.double() + hessian.double().T).mul_(0.5)
    mean = float(damped.diagonal().mean())
    if mean <= 0:
        return torch.eye(num_inputs, dtype=torch.float64, device=hessian.device)
    damped.diagonal().add_(_DAMPING * mean)
    return damped


def refit_pairs(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    hessian: Tensor,
    *,
    bit_widths: tuple[int, ...],
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Refits scale and offset of every width and group to given codes.

    Minimises ``(w - ŵ_b) H (w - ŵ_b)ᵀ`` for each row w and width b, where ``ŵ_b = scale_b * (code >> (8 - b)) +
    offset_b``. The pair of one group has a closed form given the others; groups take turns, each pair is rounded to
    float16 and taken only if the error falls. So no row is worse than with the pairs given, nor, below 8 bits, with
    those derived from the 8-bit ones, up to the rounding of the weight's precision.

    Shapes: N output features, K input features, V widths, G groups that hold inputs.

    Args:
        weight: `[N, K]` floating point.
        codes: `[N, K]` uint8.
        scale: `[V, N, G]` float16, where to start.
        offset: `[V, N, G]` float16.
        hessian: `[K, K]` float64, positive definite, as `damped_hessian` returns it.
        bit_widths: The V widths, ascending, the last is 8.
        group_size: Consecutive inputs that share a pair.

    Returns:
        Scale and offset, `[V, N, G]` float16.
    """
    scale, offset = scale.clone(), offset.clone()
    num_inputs = weight.shape[1]
    group = torch.arange(num_inputs, device=weight.device) // group_size
    # The products are made in the precision of the weight, the pairs are solved for in float64.
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    hessian = hessian.to(dtype)
    members = torch.nn.functional.one_hot(group).to(dtype)  # [K, G]
    num_rows = max(1, _CHUNK_NUMBERS // (num_inputs + 2 * members.shape[1] ** 2))
    for start in range(0, len(weight), num_rows):
        rows = slice(start, start + num_rows)
        block = weight[rows].detach().to(dtype)
        for width_idx in reversed(range(len(bit_widths))):
            bit_width = bit_widths[width_idx]
            pairs = _RowPairs(
                block,
                (codes[rows] >> (NUM_PLANES - bit_width)).to(dtype),
                scale[width_idx, rows].to(dtype),
                offset[width_idx, rows].to(dtype),
                hessian,
                members,
            )
            if bit_width != NUM_PLANES:
                pairs.offer(
                    *derive_scale_and_offset(scale[-1, rows].double(), offset[-1, rows].double(), bit_width=bit_width)
                )
            for _ in range(_NUM_SWEEPS):
                for group_idx in range(members.shape[1]):
                    pairs.fit(group_idx)
            scale[width_idx, rows], offset[width_idx, rows] = pairs.scale.half(), pairs.offset.half()
    return scale, offset


class _RowPairs:
    """The pairs of one width for n rows, and the output error as a quadratic function of steps away from them.

    Args:
        weight: `[n, K]` float32 or float64, and so are all the others.
        codes: `[n, K]`, codes of this width.
        scale: `[n, G]`, float16 values.
        offset: `[n, G]`, float16 values.
        hessian: `[K, K]`.
        members: `[K, G]`, 1 where an input is in a group.
    """

    def __init__(
        self, weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, hessian: Tensor, members: Tensor
    ) -> None:
        residual = weight - (scale @ members.T) * codes - offset @ members.T
        slope = residual @ hessian
        # Half the derivative of the error, negated; kept up to date with every step.
        self._scale_slope = ((slope * codes) @ members).double()  # [n, G]
        self._offset_slope = (slope @ members).double()
        hessian_sums = hessian @ members  # [K, G]
        self._offset_offset = (members.T @ hessian_sums).double()  # [G, G]
        pairs_of_groups = (len(codes), members.shape[1], members.shape[1])
        self._scale_scale = torch.empty(pairs_of_groups, dtype=torch.float64, device=codes.device)  # symmetric
        self._scale_offset = torch.empty_like(self._scale_scale)
        start = 0
        for index, size in enumerate(members.sum(0).int().tolist()):
            used = slice(start, start + size)
            of_later = (codes[:, used] @ hessian[used, start:]).mul_(codes[:, start:]) @ members[start:, index:]
            self._scale_scale[:, index, index:] = self._scale_scale[:, index:, index] = of_later.double()
            self._scale_offset[:, index] = codes[:, used] @ hessian_sums[used]
            start += size
        self.scale, self.offset = scale.double(), offset.double()

    def offer(self, scale: Tensor, offset: Tensor) -> None:
        """Takes other pairs `[n, G]`, rounded to float16, for the rows whose error they lower."""
        scale_step, offset_step = scale.half().double() - self.scale, offset.half().double() - self.offset
        scale_slope = (self._scale_scale @ scale_step[..., None] + self._scale_offset @ offset_step[..., None])[..., 0]
        offset_slope = (scale_step[:, None] @ self._scale_offset)[:, 0] + offset_step @ self._offset_offset
        change = (scale_step * (scale_slope - 2 * self._scale_slope)).sum(1)
        change += (offset_step * (offset_slope - 2 * self._offset_slope)).sum(1)
        better = (change < 0)[:, None]  # not so for NaN: a derived pair may overflow float16
        self.scale += torch.where(better, scale_step, 0.0)
        self.offset += torch.where(better, offset_step, 0.0)
        self._scale_slope -= torch.where(better, scale_slope, 0.0)
        self._offset_slope -= torch.where(better, offset_slope, 0.0)

    def fit(self, group: int) -> None:
        """Moves the pair of one group to its best given the others, for the rows whose error that lowers."""
        ss, so = self._scale_scale[:, group, group], self._scale_offset[:, group, group]
        oo = self._offset_offset[group, group]
        slope_s, slope_o = self._scale_slope[:, group], self._offset_slope[:, group]
        determinant = ss * oo - so.square()
        solvable = determinant > 1e-9 * ss * oo  # not where all codes of the group are equal
        best = self.scale[:, group] + (slope_s * oo - slope_o * so) / torch.where(solvable, determinant, 1.0)
        scale_step = torch.where(solvable, best.clamp_min(0).half().double() - self.scale[:, group], 0.0)
        # The offset is fitted to the rounded scale.
        best = self.offset[:, group] + (slope_o - so * scale_step) / oo
        offset_step = best.half().double() - self.offset[:, group]
        change = scale_step * (ss * scale_step + 2 * so * offset_step - 2 * slope_s)
        change += offset_step * (oo * offset_step - 2 * slope_o)
        better = change < 0
        scale_step, offset_step = torch.where(better, scale_step, 0.0), torch.where(better, offset_step, 0.0)
        self.scale[:, group] += scale_step
        self.offset[:, group] += offset_step
        self._scale_slope -= self._scale_scale[:, group] * scale_step[:, None]
        self._scale_slope -= self._scale_offset[:, :, group] * offset_step[:, None]
        self._offset_slope -= self._scale_offset[:, group] * scale_step[:, None]
        self._offset_slope -= self._offset_offset[group] * offset_step[:, None]
