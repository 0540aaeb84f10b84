"""Which setting of the dial a request gets: as given, for the speed asked for, or the middle one."""

from __future__ import annotations

from flexquant_rl.engine.control.artefact import DeployedPolicy
from flexquant_rl.engine.control.deployed_drafts import DeployedDrafts
from flexquant_rl.engine.control.dial import check_kl_weight
from flexquant_rl.engine.control.policy import DialPoint, StaticPolicy
from flexquant_rl.engine.errors import InputError


def dial_setting(
    policy: DeployedPolicy,
    *,
    speed: float | None,
    kl_weight: float | None,
    names: tuple[str, str] = ("speed", "kl_weight"),
) -> DialPoint | None:
    """The setting for what was given, at most one of the two.

    Args:
        policy: The policy.
        speed: Modelled speedup to aim for.
        kl_weight: The dial itself; what it gives is not known then.
        names: What both are called where they were given.

    Returns:
        The setting; None if the policy has no dial.

    Raises:
        InputError: If a number is out of its domain, both are given, the policy has no dial to set, or nothing is given
            and its card has no table to choose from.
    """
    if isinstance(policy, StaticPolicy | DeployedDrafts):
        for name, value in zip(names, (speed, kl_weight), strict=True):
            if value is not None:
                raise InputError(
                    f"{name} {value:g} sets a dial, and {policy.name} has none; choose another width instead"
                )
        return None
    if kl_weight is not None:
        if speed is not None:
            raise InputError(f"{names[0]} {speed:g} and {names[1]} {kl_weight:g} set the same dial; give one of them")
        check_kl_weight(kl_weight)
        return DialPoint(kl_weight, float("nan"), float("nan"), float("nan"))
    if speed is not None:
        return policy.card.setting_for_speed(speed)
    if not policy.card.dial:
        raise InputError(f"{policy.name!r} has no table of its dial to choose a setting from; give {names[1]}")
    return policy.card.middle_setting()
