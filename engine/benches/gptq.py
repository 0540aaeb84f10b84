"""Times how gptq chooses the codes of one group of inputs: natively, as it runs on a CPU, and in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexquant_rl.engine.benches.clocks import Call, host_clock
from flexquant_rl.engine.benches.harness import Provider, Row, Track, calls, interleave, rows
from flexquant_rl.engine.benches.options import GptqBench
from flexquant_rl.engine.quantisation.gptq import Grid

_BIT_WIDTHS = (3, 4, 5, 6, 8)


def bench_gptq(config: GptqBench, track: Track = iter) -> list[Row]:
    """Times both loops of gptq over one group: with errors fed back, and a sweep of coordinate descent.

    Args:
        config: What to time.
        track: Wraps the loop over rounds.

    Returns:
        One row per loop and provider.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.num_threads)
    clock = host_clock(config.num_threads)
    shape = (config.group_size, config.num_outputs)
    scale = torch.stack([(0.7 + 0.6 * torch.rand(config.num_outputs)) * 2.0**-b for b in _BIT_WIDTHS])
    offset = -0.5 + 0.05 * torch.randn(len(_BIT_WIDTHS), config.num_outputs)
    grid = Grid(scale, offset, _BIT_WIDTHS, torch.tensor([2.0**b for b in _BIT_WIDTHS]))
    weight, codes = 0.3 * torch.randn(shape), torch.randint(0, 256, shape).float()
    targets = weight[:, None].repeat(1, len(_BIT_WIDTHS), 1)
    inputs = torch.randn(4 * config.group_size, config.group_size)
    hessian = inputs.T @ inputs / len(inputs)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float().contiguous()

    def fed_back(run: Callable[[Tensor, Tensor, Tensor], None]) -> Call:
        return lambda: run(targets.clone(), codes, factor)

    def descended(run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]) -> Call:
        return lambda: run(weight, 0.01 * targets, 0.01 * targets, codes, hessian)

    providers = [
        Provider("native_feed_back", calls(clock, [fed_back(grid.feed_back)])),
        Provider("torch_feed_back", calls(clock, [fed_back(grid.feed_back_in_torch)])),
        Provider("native_descend", calls(clock, [descended(grid.descend)])),
        Provider("torch_descend", calls(clock, [descended(grid.descend_in_torch)])),
    ]
    interleave(providers, config.rounds, track)
    common = {"op": "gptq", "num_outputs": config.num_outputs, "group_size": config.group_size, "seed": config.seed}
    return rows(providers, common | {"num_threads": config.num_threads, "clock": clock.name})
