"""Policies of the user's own: a class in a module of theirs, named `module:Class:key=value,...`.

Such a class is written as ours are (`UnboundPolicy`). What it does is checked where ours are trusted.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from dataclasses import dataclass, is_dataclass, replace
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from flexquant_rl.agents.policies.names import check_parameters, policy_name
from flexquant_rl.agents.policies.unbound import Family, PolicyContext, UnboundPolicy
from flexquant_rl.engine.control.decision import Decision, Policy, PositionPolicy, StaticAllocation
from flexquant_rl.engine.errors import InputError

_NAME = re.compile(r"(?P<module>[^\W\d][\w.]*):(?P<kind>[^\W\d]\w*)(:(?P<parameters>.*))?", re.DOTALL)


def split_own_name(name: str) -> tuple[str, str, str] | None:
    """Module, class and parameters of `module:Class` or `module:Class:key=value,...`; None for any other text."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match["module"], match["kind"], match["parameters"] or "")


def load_own_class(module: str, kind: str, name: str) -> type[UnboundPolicy] | None:
    """Imports a class of policies; modules of the current directory are found too.

    Args:
        module: Dotted name of the module.
        kind: Name of the class.
        name: Name of the policy, for messages.

    Returns:
        The class; None where there is no such module.

    Raises:
        InputError: If importing the module fails, if it has no such class, or if the class is not one of policies.
    """
    imported = _import(module, name)
    if imported is None:
        return None
    found = getattr(imported, kind, None)
    if found is None:
        raise InputError(f"policy {name!r}: module {module} has no class {kind}; check the name")
    if not isinstance(found, type) or not is_dataclass(found) or not callable(getattr(found, "bind", None)):
        raise InputError(
            f"policy {name!r}: {kind} is not a policy; make it a frozen dataclass with a method bind(context), as "
            "docs/extending.md shows"
        )
    if not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # what every dataclass has
        raise InputError(f"policy {name!r}: {kind} can change; write @dataclass(frozen=True)")
    if isinstance(vars(found).get("family"), Family):
        raise InputError(
            f"policy {name!r}: {kind} has a family, as the policies of agents/policies have; leave it out, or list "
            "the class in agents/policies/families.py"
        )
    kind_of_policy = cast(type[UnboundPolicy], found)
    check_parameters(kind_of_policy, name)
    return kind_of_policy


def _import(module: str, name: str) -> ModuleType | None:
    """The module; None where it does not exist."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a command's own folder stands there instead
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return None
        raise InputError(
            f"policy {name!r}: importing {module} fails with {type(error).__name__}: {error}{_place(error)}; correct "
            "the module"
        ) from error


def _place(error: BaseException) -> str:
    """Where in the user's code an import failed; "" where the message says it, as that of a SyntaxError does."""
    machinery = ("<frozen", importlib.__file__, __file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(machinery):
            return f" (line {frame.lineno} of {frame.filename})"
    return ""


def bind_own(policy: UnboundPolicy, context: PolicyContext) -> Policy:
    """Binds a policy of the user's own, under the name that it was asked for by.

    Raises:
        InputError: If it cannot be bound, or binds to something that is no policy.
    """
    name, bound = policy_name(policy), policy.bind(context)
    is_stored = torch.zeros(context.profile.bit_widths[-1] + 2, dtype=torch.bool)
    is_stored[list(context.profile.bit_widths)] = True
    checked = CheckedPolicy(name, bound, context.schema.num_units, is_stored)
    if isinstance(bound, StaticAllocation):  # once is enough, and it stays as cheap as ours
        checked.check(Decision(bound.bit_widths[None]), 1)
        return replace(bound, name=name)
    if isinstance(bound, PositionPolicy):  # as above, checked at every step
        return replace(bound, name=name, at=checked.at)
    if not callable(bound):
        raise InputError(f"policy {name!r}: bind returned {type(bound).__name__}; return a function of the signals")
    return checked


@dataclass(frozen=True)
class CheckedPolicy:
    """A policy whose every decision is checked before anything is read by it.

    Attributes:
        name: As it appears in tables.
        policy: The policy.
        num_units: U.
        is_stored: `[W + 2]` bool, whether each width is stored; W is the largest one, and neither end is stored.
    """

    name: str
    policy: Policy
    num_units: int
    is_stored: Tensor

    def __call__(self, signals: Tensor) -> Decision:
        """See `Policy`.

        Raises:
            InputError: If the decision is not one for these rows.
        """
        decision = self.policy(signals)
        self.check(decision, len(signals))
        return decision

    def at(self, positions: Tensor) -> Tensor:
        """As `PositionPolicy.at`, for a policy that is one; raises as a call does."""
        assert isinstance(self.policy, PositionPolicy)
        widths = self.policy.at(positions)
        self.check(Decision(widths), len(positions))
        return widths

    def check(self, decision: Decision, num_rows: int) -> None:
        """Raises InputError unless a decision gives each unit of each row a stored width."""
        if not isinstance(decision, Decision) or not isinstance(decision.bit_widths, Tensor):
            raise InputError(
                f"policy {self.name!r}: it returned {type(decision).__name__}; return Decision(bit_widths) with a "
                "tensor of widths"
            )
        widths = decision.bit_widths
        if tuple(widths.shape) != (num_rows, self.num_units) or widths.dtype != torch.int64:
            raise InputError(
                f"policy {self.name!r}: its widths are {list(widths.shape)} {widths.dtype}; return [B, U] = "
                f"[{num_rows}, {self.num_units}] torch.int64"
            )
        is_stored = self.is_stored.to(widths.device)[widths.clamp(0, len(self.is_stored) - 1)]
        if not bool(is_stored.all()):
            stored = ", ".join(map(str, self.is_stored.nonzero()[:, 0].tolist()))
            raise InputError(
                f"policy {self.name!r}: it chose width {int(widths[~is_stored][0])}, which is not stored; choose one "
                f"of {stored}"
            )
