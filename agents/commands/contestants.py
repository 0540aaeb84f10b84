"""The policies that `--policy A B C` names, bound to one prepared model: learned ones at settings of their dial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexquant_rl.agents.evaluation.baselines import contestant
from flexquant_rl.agents.evaluation.budgets import Contestant
from flexquant_rl.agents.export import ExportedPolicy, load_exported_together
from flexquant_rl.agents.policies.drafts import Drafts, parse_drafts
from flexquant_rl.agents.policies.families import PPO, TOKEN, family_name, parse_policy
from flexquant_rl.agents.policies.relative_error import RelativeError, parse_in_flight
from flexquant_rl.agents.policies.unbound import PolicyContext, UnboundPolicy
from flexquant_rl.agents.preparation import Prepared, policy_context
from flexquant_rl.engine.control.artefact import DeployedPolicy
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.policy import LearnedPolicy, StaticPolicy
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig


@dataclass(frozen=True)
class AskedPolicies:
    """What was asked for, before there is a model.

    Attributes:
        names: As they were given, in order.
        unbound: Policies by name.
        exported: Policies from directories.
        in_flight: What chooses within the pass, by name; nothing binds it, and it is judged apart from the others.
    """

    names: tuple[str, ...]
    unbound: Mapping[str, UnboundPolicy | Drafts]
    exported: Mapping[str, ExportedPolicy]
    in_flight: Mapping[str, RelativeError]

    @staticmethod
    def read(names: Sequence[str], *, may_choose_in_flight: bool = False) -> AskedPolicies:
        """Reads them all: a wrong name or a damaged policy should not be found out after minutes.

        Args:
            names: As `--policy` has them.
            may_choose_in_flight: Whether what no decoder serves has a place here.

        Raises:
            InputError: If there is none, one is named twice, or one of them cannot be read.
        """
        if not names:
            raise InputError("--policy names no policy; name one or more, e.g. fixed:4 knapsack:4.5")
        if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
            raise InputError(f"--policy names {twice} twice; name each once")
        directories = {name: Path(name) for name in names if Path(name).is_dir()}
        by_name = [name for name in names if name not in directories]
        found = {name: parse_in_flight(name) for name in by_name} if may_choose_in_flight else {}
        in_flight = {name: one for name, one in found.items() if one is not None}
        unbound = {name: parse_drafts(name) or parse_policy(name) for name in by_name if name not in in_flight}
        return AskedPolicies(tuple(names), unbound, load_exported_together(directories), in_flight)

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How they were trained to have a plain model nested; None where none of them was trained."""
        return next(iter(self.exported.values())).quantization if self.exported else None

    @property
    def carrying(self) -> list[ExportedPolicy]:
        """The exported ones, first those that carry a profile: of fixed widths and drafts nothing was measured."""
        return sorted(self.exported.values(), key=lambda one: -one.profile.num_tokens)

    def bound(
        self, prepared: Prepared, num_dials: int, deployed: Mapping[str, DeployedPolicy] | None = None
    ) -> list[tuple[str, Contestant]]:
        """Each that decides before a step, by its name, in order; learned ones at every setting of the dial.

        Args:
            prepared: The model.
            num_dials: Settings of a dial.
            deployed: Policies by name that are bound already, as a knapsack should be once.
        """
        context, deployed = policy_context(prepared), deployed or {}
        found: list[tuple[str, Contestant]] = []
        for name in self.names:
            if name in self.in_flight:
                continue
            if name in self.unbound:
                found.append((name, _by_name(self.unbound[name], context, deployed.get(name))))
                continue
            policy = self.exported[name].policy
            if isinstance(policy, DeployedDrafts):
                found.append((name, Contestant.of_drafts(f"{Drafts.family.name}:{name}", policy)))
                continue
            if isinstance(policy, DialPolicy):  # each a front of its own
                kind = PPO if isinstance(policy, LearnedPolicy) else TOKEN
                dials = _dials(prepared, policy, num_dials)
                found += [(name, Contestant(f"{kind.name}:{name}", policy, dial)) for dial in dials]
            else:
                found.append((name, Contestant(name, policy)))
        return found


def check_counts(sequences: int, dials: int) -> None:
    """Raises InputError unless the numbers of a command's `--sequences` and `--dials` are numbers to work with."""
    for option, value in (("--sequences", sequences), ("--dials", dials)):
        if value < 1:
            raise InputError(f"{option} {value} must be at least 1; give 1 or more, or leave it out")


def _by_name(asked: UnboundPolicy | Drafts, context: PolicyContext, deployed: DeployedPolicy | None) -> Contestant:
    if isinstance(asked, Drafts):
        drafts = deployed if isinstance(deployed, DeployedDrafts) else asked.bind(context)
        return Contestant.of_drafts(Drafts.family.name, drafts)
    # What has a name and is deployed looks at no token.
    return (
        Contestant(family_name(asked), deployed) if isinstance(deployed, StaticPolicy) else contestant(asked, context)
    )


def _dials(prepared: Prepared, policy: DialPolicy, count: int) -> list[float]:
    """Settings of a policy's dial: over the range that its card knows, or the one asked for."""
    known = [point.kl_weight for point in policy.card.dial]
    if prepared.env.kl_weight is not None or not known:
        return prepared.dials(count).tolist()
    return torch.logspace(math.log10(min(known)), math.log10(max(known)), count, dtype=torch.float64).tolist()
