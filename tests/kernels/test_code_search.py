"""The native search for nested codes against the same in torch, and what no result may depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexquant_rl.engine.quantisation import gptq
from flexquant_rl.engine.quantisation.gptq import Grid
from flexquant_rl.kernels.code_search import CodeSearch, can_search
from flexquant_rl.kernels.native import supported_isas

pytestmark = pytest.mark.skipif(not supported_isas(), reason="no native library")

STORED = [(8,), (4, 8), (3, 4, 5, 6, 8), (1, 2, 3, 4, 5, 6, 7, 8)]


class Problem:
    """A group of inputs with random grids, targets, moments and codes."""

    def __init__(self, bit_widths: tuple[int, ...], num_inputs: int, num_rows: int) -> None:
        num_widths = len(bit_widths)
        scale = torch.stack([2.0**-b * (0.7 + 0.6 * torch.rand(num_rows)) for b in bit_widths])
        scale[:, torch.rand(num_rows) < 0.05] = 0  # groups of equal weights
        offset = -0.5 + 0.05 * torch.randn(num_widths, num_rows)
        self.importance = torch.rand(num_widths) + 0.1
        self.grid = Grid(scale, offset, bit_widths, self.importance)
        self.weight = 0.3 * torch.randn(num_inputs, num_rows)
        inputs = torch.randn(4 * num_inputs, num_inputs) @ (torch.eye(num_inputs) + 0.1)
        self.hessian = inputs.T @ inputs / len(inputs)
        self.factor = torch.linalg.cholesky(torch.linalg.inv(self.hessian.double()), upper=True).float().contiguous()
        self.targets = self.weight[:, None] + 0.02 * torch.randn(num_inputs, num_widths, num_rows)

    def fed_back(self, *, native: bool = True) -> tuple[Tensor, Tensor]:
        """Codes and errors; the codes begin as NaN."""
        codes, targets = torch.full_like(self.weight, torch.nan), self.targets.clone()
        feed_back = self.grid.feed_back if native else self.grid.feed_back_in_torch
        feed_back(targets, codes, self.factor)
        return codes, targets

    def descended(self, codes: Tensor, *, native: bool = True) -> tuple[Tensor, Tensor]:
        """Codes and errors after a sweep over the group from some codes."""
        codes = codes.clone()
        errors = torch.stack([self.weight[j] - self.grid.decode(codes[j]) for j in range(len(codes))])
        slopes = (self.hessian @ errors.flatten(1)).view_as(errors)
        descend = self.grid.descend if native else self.grid.descend_in_torch
        descend(self.weight, errors, slopes, codes, self.hessian)
        return codes, errors


@pytest.mark.parametrize("bit_widths", STORED)
@pytest.mark.parametrize(("num_inputs", "num_rows"), [(1, 3), (32, 33), (77, 16), (128, 50)])
def test_equals_torch(bit_widths: tuple[int, ...], num_inputs: int, num_rows: int) -> None:
    problem = Problem(bit_widths, num_inputs, num_rows)
    assert can_search(problem.weight)
    start = problem.fed_back()[0]
    for found, expected in (
        (problem.fed_back(), problem.fed_back(native=False)),
        (problem.descended(start), problem.descended(start, native=False)),
    ):
        codes, errors = found
        assert torch.equal(codes, codes.round())
        assert 0 <= float(codes.min()) <= float(codes.max()) <= 255
        # Where two codes are as good, rounding decides, and the row goes its own way from there.
        is_same = (codes == expected[0]).all(0)
        assert int((~is_same).sum()) <= max(1, num_rows // 10)
        torch.testing.assert_close(errors[..., is_same], expected[1][..., is_same], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("bit_widths", STORED)
def test_no_row_depends_on_another_or_on_threads_or_on_the_body(bit_widths: tuple[int, ...]) -> None:
    problem = Problem(bit_widths, 64, 37)
    grid = problem.grid
    grids = torch.stack([grid.scale, grid.offset, grid._steps_per_value, grid._cost, grid._wish_shares])

    def run(rows: slice, isa: str, num_threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            search = CodeSearch(grids[..., rows].contiguous(), bit_widths, grid._num_searched, isa=isa)
            targets = problem.targets[..., rows].clone(memory_format=torch.contiguous_format)
            weight = problem.weight[:, rows].contiguous()
            codes = torch.full_like(weight, torch.nan)
            search.feed_back(targets, codes, problem.factor)
            fed_back = codes.clone()
            errors = torch.stack(
                [
                    w - (c / grid._codes_per_cell).floor() * grid.scale[:, rows] - grid.offset[:, rows]
                    for w, c in zip(weight, codes, strict=True)
                ]
            )
            slopes = (problem.hessian @ problem.targets.flatten(1)).view_as(problem.targets)[..., rows].contiguous()
            search.descend(weight, errors, slopes, codes, problem.hessian)
        finally:
            torch.set_num_threads(before)
        return targets, fed_back, errors, codes

    whole = run(slice(None), supported_isas()[-1], 1)
    assert all(bool(part.isfinite().all()) for part in whole)
    for isa in supported_isas():
        for num_threads in (1, 2, 3):
            for rows in (slice(None), slice(0, 16), slice(5, 6), slice(20, 37)):
                for part, expected in zip(run(rows, isa, num_threads), whole, strict=True):
                    assert torch.equal(part, expected[..., rows]), (isa, num_threads, rows)


def test_a_whole_weight_is_as_good_as_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = 0.05 * torch.randn(70, 150), torch.randn(900, 150) @ (torch.eye(150) + 0.2 * torch.randn(150, 150))
    hessian = (inputs.T @ inputs).double() / len(inputs)

    def energy() -> list[float]:
        nested = gptq.quantize_gptq(weight, hessian)
        errors = [weight.double() - gptq.dequantize(nested, bit_width=b).double() for b in (3, 4, 5, 6, 8)]
        return [float(((error @ hessian) * error).sum()) for error in errors]

    native = energy()
    monkeypatch.setattr(gptq, "can_search", lambda weight: False)
    assert native == pytest.approx(energy(), rel=0.02)


def test_what_the_search_cannot_take() -> None:
    problem = Problem((3, 4, 8), 16, 5)
    assert not can_search(problem.weight.double())
    grids = torch.ones(5, 3, 5)
    search = CodeSearch(grids, (3, 4, 8), 4)
    codes = torch.zeros(16, 5)
    with pytest.raises(ValueError, match="targets is torch.float64"):
        search.feed_back(problem.targets.double(), codes, problem.factor)
    with pytest.raises(ValueError, match=r"codes has strides \(1, 16\); call contiguous"):
        search.feed_back(problem.targets, torch.zeros(5, 16).T, problem.factor)
    with pytest.raises(ValueError, match="with unit stride in a row"):
        search.feed_back(problem.targets, codes, problem.factor.T)
    for bit_widths, searched in (((4, 3, 8), 4), ((3, 4, 7), 4), ((3, 4, 8), 0), ((3, 4, 8), 17)):
        with pytest.raises(ValueError, match="bad argument; a group has 1 to 128 inputs"):
            CodeSearch(grids, bit_widths, searched).feed_back(problem.targets.clone(), codes, problem.factor)
    with pytest.raises(ValueError, match="grids is torch.float32"):
        CodeSearch(torch.ones(4, 3, 5), (3, 4, 8), 4)
