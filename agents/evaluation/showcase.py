"""Where a learned policy moves most: the test sequence, the dial and the training seed of the picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.evaluation.evaluate import Trace
from flexquant_rl.agents.policies.families import PPO


@dataclass(frozen=True)
class Showcase:
    """One test sequence under a learned policy.

    Attributes:
        sequence_idx: Which of the test sequences.
        num_sequences: How many there are.
        seed: Training seed of the policy.
        kl_weight: The dial, full-width steps per nat.
        movement_bits: Standard deviation of a unit's width over tokens, bits, mean over units.
        speedup: Modelled, on this sequence.
        bit_widths: `[T, U]` int64.
        output_kl_nats: `[T]`.
    """

    sequence_idx: int
    num_sequences: int
    seed: int
    kl_weight: float
    movement_bits: float
    speedup: float
    bit_widths: Tensor
    output_kl_nats: Tensor

    def title(self) -> str:
        """Sequence, dial and seed, without their units."""
        sequence = f"test sequence {self.sequence_idx + 1} of {self.num_sequences}"
        return f"{sequence}, dial {self.kl_weight:.3g}, seed {self.seed}"

    def words(self) -> str:
        """How much it moves, and in what units the dial is."""
        return (
            f"widths move by {self.movement_bits:.2f} bits (standard deviation over tokens, mean over units); "
            f"{self.speedup:.2f}x modelled; the dial is in full-width steps per nat"
        )


class MostMoving:
    """Keeps, of all traces of learned policies that it is shown, the sequence whose widths vary most over tokens."""

    def __init__(self) -> None:
        self.found: Showcase | None = None

    def consider(self, one: Contestant, trace: Trace) -> None:
        """Looks at what a contestant did; policies that are not trained are left out."""
        if one.family != PPO.name or one.seed is None or one.kl_weight is None:
            return
        movement = movement_bits(trace.bit_widths)
        index = int(movement.argmax())
        largest = float(movement[index])
        if self.found is None or largest > self.found.movement_bits:
            self.found = Showcase(
                sequence_idx=index,
                num_sequences=len(movement),
                seed=one.seed,
                kl_weight=one.kl_weight,
                movement_bits=largest,
                speedup=trace.full_latency_ms / float(trace.latency_ms[index].double().mean()),
                bit_widths=trace.bit_widths[index],
                output_kl_nats=trace.output_kl_nats[index],
            )


def movement_bits(bit_widths: Tensor) -> Tensor:
    """Standard deviation of a unit's width over tokens, mean over units: `[..., T, U]` to `[...]` float64."""
    return bit_widths.double().std(dim=-2, correction=0).mean(-1)
