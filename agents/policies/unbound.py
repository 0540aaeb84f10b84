"""What every family of policies has: parameters that bind to a model, and facts for tables and pictures.

Parameters and the callable are two objects. The parameters know no model, so that they can be parsed, printed, compared
and checked before anything is loaded; `bind` makes the callable for one model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from flexquant_rl.agents.policies.static_front import StaticFront
from flexquant_rl.engine.control.decision import Decision, Policy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.traces import is_whole
from flexquant_rl.engine.errors import InputError

_LARGEST_WIDTH = 8


@dataclass(frozen=True)
class Family:
    """What tables and pictures know of a family of policies.

    Attributes:
        name: First part of the names of its policies, and `family` of their rows.
        label: Its name in legends.
        colour: Its colour, `#rrggbb`.
        marker: Its marker, as matplotlib names them.
        draws: `curve` joins its points along their Pareto front; `points` leaves them alone.
        is_static: Whether its widths are the same at every token. Static families are what all others must beat.
        is_oracle: Whether it has seen the text that it is judged on. It is then a bound and cannot be deployed.
        is_in_flight: Whether it chooses within the pass, which no decoder does: a reference, not deployed either.
    """

    name: str
    label: str
    colour: str
    marker: str
    draws: Literal["curve", "points"] = "curve"
    is_static: bool = False
    is_oracle: bool = False
    is_in_flight: bool = False


class Recording(Protocol):
    """Training text read once, for policies that are fitted to it."""

    @property
    def signals(self) -> Tensor:
        """`[S, T, dim]` of S sequences of T tokens."""

    def token_kl_nats(self, bit_widths: Tensor) -> Tensor:
        """Output KL of every token, `[S, T]`, had all been read at one allocation `[U]`."""


@dataclass(frozen=True)
class PolicyContext:
    """The model that policies are bound to, as far as they may know it.

    Attributes:
        profile: Sensitivities and latencies of the units at the stored widths.
        front: The static allocations that no other one beats.
        schema: Names and places of the signals.
        model_fingerprint: Fingerprint of the nested model.
        recording: Makes or finds a recording of training text; None where there is no text.
    """

    profile: Profile
    front: StaticFront
    schema: SignalSchema
    model_fingerprint: str
    recording: Callable[[], Recording] | None = None

    def column(self, bit_width: int, policy: str) -> int:
        """Index of a width among the stored ones.

        Args:
            bit_width: The width.
            policy: Name of the policy that asks for it.

        Raises:
            InputError: If the width is not stored.
        """
        check_stored(bit_width, self.profile.bit_widths, policy)
        return self.profile.bit_widths.index(bit_width)

    def allocation(self, mean_bit_width: float, policy: str) -> Tensor:
        """`[U]`: a whole mean is that stored width for every unit, any other the point of the front nearest to it.

        Args:
            mean_bit_width: Mean width, bits.
            policy: Name of the policy that asks for it.

        Raises:
            InputError: If a whole mean is not a stored width, or another one is outside the stored widths.
        """
        if is_whole(mean_bit_width):
            check_stored(int(mean_bit_width), self.profile.bit_widths, policy)
            return torch.full((self.schema.num_units,), int(mean_bit_width))
        self.check_mean(mean_bit_width, policy)
        return self.front.nearest(mean_bit_width)

    def check_mean(self, mean_bit_width: float, policy: str) -> None:
        """Raises InputError if the policy of that name asks for a mean outside the stored widths."""
        lowest, highest = self.profile.bit_widths[0], self.profile.bit_widths[-1]
        if not lowest <= mean_bit_width <= highest:
            raise InputError(
                f"policy {policy!r}: mean width {mean_bit_width:g} is outside the stored widths {lowest} to "
                f"{highest}; choose one in between"
            )


class PolicyParameters(Protocol):
    """What a policy's name says: a frozen dataclass whose fields are int, float, bool or str.

    Its `__post_init__` raises InputError for parameters that make no policy of any model.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class UnboundPolicy(PolicyParameters, Protocol):
    """Parameters that make a `Policy` of a model."""

    def bind(self, context: PolicyContext) -> Policy:
        """The policy for one model.

        Raises:
            InputError: If the parameters make no policy of this model.
        """


class Baseline(UnboundPolicy, Protocol):
    """A policy of ours: the facts of its family are with it."""

    family: ClassVar[Family]


@dataclass(frozen=True)
class RulePolicy:
    """A policy that is a plain function of the signals.

    Attributes:
        name: As it appears in tables.
        decide: Maps signals `[B, dim]` float32 to a decision for B rows.
    """

    name: str
    decide: Callable[[Tensor], Decision]

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`."""
        return self.decide(signals)


def check_stored(bit_width: int, bit_widths: tuple[int, ...], policy: str) -> None:
    """Raises InputError if a width that the policy of that name asks for is not among the stored ones."""
    if bit_width not in bit_widths:
        stored = ", ".join(map(str, bit_widths))
        raise InputError(f"policy {policy!r}: width {bit_width} is not stored; choose one of {stored}")


def check_width(name: str, bit_width: float) -> None:
    """Raises InputError if a parameter of that name is no bit-width of any model."""
    if not 1 <= bit_width <= _LARGEST_WIDTH:
        raise InputError(
            f"{name}={bit_width:g} is no width, which is from 1 to {_LARGEST_WIDTH}; choose one that the model stores "
            "(`fq inspect MODEL` lists them)"
        )
