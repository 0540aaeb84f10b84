"""The families of policies that tables and pictures know, in their order, and policies by name.

A new family is a file of its own and a place in `POLICIES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import cycle

from flexquant_rl.agents.policies.drafts import Drafts, LookupDrafts, parse_drafts
from flexquant_rl.agents.policies.entropy import EntropyThreshold
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.knapsack import Knapsack
from flexquant_rl.agents.policies.names import prefix, read_parameters, usage
from flexquant_rl.agents.policies.own import bind_own, load_own_class, split_own_name
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.policies.regressor import Regressor
from flexquant_rl.agents.policies.relative_error import RelativeError, parse_in_flight
from flexquant_rl.agents.policies.schedule import Schedule
from flexquant_rl.agents.policies.unbound import Baseline, Family, PolicyContext, PolicyParameters, UnboundPolicy
from flexquant_rl.engine.control.decision import Policy
from flexquant_rl.engine.errors import InputError

# In the order of tables and legends.
POLICIES: tuple[type[Baseline], ...] = (Fixed, RandomWidths, Schedule, EntropyThreshold, Regressor, Knapsack)
# Families without names to parse: the best static allocation of each time budget, the learned policy's network before
# PPO, what the run learned of tokens, what is loaded from a directory, and what looks at the text that it is judged on.
STATIC = Family("static", "static (best)", "#004B87", "p", is_static=True)
UNTRAINED = Family("untrained", "untrained (cloned)", "#E8A06A", "d")
TOKEN = Family("token", "token (looked up)", "#882255", "8")
PPO = Family("ppo", "ppo", "#D55E00", "o")
ORACLE = Family("oracle", "oracle of tokens (bound)", "#009E73", "*", draws="points", is_oracle=True)
UNIT_ORACLE = Family("oracle-unit", "oracle of units (bound)", "#00614A", "H", draws="points", is_oracle=True)

_TABLES_ONLY = {
    STATIC.name: "static is another allocation at each time budget; name one, e.g. knapsack:4.5",
    UNTRAINED.name: "train.py --baselines untrained has it in its table",
    TOKEN.name: "name the one that a run has made, RUN/by_token",
    PPO.name: "a learned policy is named by the directory of its run",
    ORACLE.name: "an oracle knows the text; train.py has it in its table",
    UNIT_ORACLE.name: "an oracle knows the text; train.py has it in its table",
}
"""What to do for families that tables show and no name makes."""

# The colours above are Okabe and Ito's and darker relatives: told apart with any colour vision, and the marker says it
# again. These are left for families that only the user knows.
_SPARE_COLOURS = ("#AA4499", "#117733", "#332288", "#6699CC", "#661100", "#999933", "#56B4E9")
_LEGEND_CHARACTERS = 24
_SPARE_MARKERS = ("<", ">", "1", "3", "h", "4", "2")


def family_facts(names: Iterable[str]) -> dict[str, Family]:
    """The facts of families by name, in the order of tables and legends: oracles last, and unknown ones before them."""
    ours = (
        *(policy.family for policy in POLICIES),
        STATIC,
        UNTRAINED,
        TOKEN,
        PPO,
        Drafts.family,
        RelativeError.family,
        ORACLE,
        UNIT_ORACLE,
    )
    known = {family.name: family for family in ours}
    present = set(names)
    spare = cycle(zip(_SPARE_COLOURS, _SPARE_MARKERS, strict=True))
    facts = [family for name, family in known.items() if name in present]
    facts += [Family(name, _short(name), *next(spare)) for name in sorted(present - known.keys())]
    return {family.name: family for family in sorted(facts, key=lambda family: family.is_oracle)}


def _short(name: str) -> str:
    """A name for a legend: of `ppo:/a/long/path/to/run/policy` the kind and the last two folders."""
    kind, _, path = name.partition(":")
    folders = path.split("/")
    return name if len(name) <= _LEGEND_CHARACTERS or len(folders) < 3 else f"{kind}:{'/'.join(folders[-2:])}"


def family_name(policy: UnboundPolicy) -> str:
    """The family of a policy's rows: `module:Class` for a class of the user's."""
    return prefix(type(policy))


def parse_policy(name: str) -> UnboundPolicy:
    """Reads the name of a policy; needs no model.

    Args:
        name: `family:key=value,...`, `module:Class` or `module:Class:key=value,...`. The first parameter needs no key.

    Raises:
        InputError: If there is no such family or class, or if its parameters are wrong.
    """
    family, _, parameters = name.partition(":")
    for kind in POLICIES:
        if kind.family.name == family:
            return read_parameters(kind, parameters, name)
    if parse_drafts(name) is not None:
        raise InputError(f"policy {name!r} drafts, and a policy that settles every step is asked for; try fixed:4")
    if parse_in_flight(name) is not None:
        raise InputError(
            f"policy {name!r} chooses within the pass, which no decoder does; compare it with fq evaluate, and run "
            "another one, e.g. knapsack:4.5"
        )
    own = split_own_name(name)
    if own is not None:
        found = load_own_class(own[0], own[1], name)
        if found is not None:
            return read_parameters(found, own[2], name)
    raise InputError(f"unknown policy {name!r}; {_hint(name)} (or the directory of an exported policy)")


def _hint(name: str) -> str:
    """What may have been meant by a name that nothing has."""
    family, _, parameters = name.partition(":")
    own = split_own_name(name)
    kinds: tuple[type[PolicyParameters], ...] = (*POLICIES, Drafts, LookupDrafts, RelativeError)
    near = difflib.get_close_matches(family, [prefix(kind) for kind in kinds], n=1, cutoff=0.5)
    if family in _TABLES_ONLY:
        return _TABLES_ONLY[family]
    if near and not (own is not None and own[1][0].isupper()):
        example = {RelativeError.family.name: "0.5", LookupDrafts.family.name: ""}.get(near[0], "4")
        return f"did you mean {':'.join(filter(None, (near[0], parameters or example)))}?"
    if own is not None:
        return f"there is no module {own[0]} here; give its name without .py, e.g. my_policies:MyPolicy"
    return f"known: {', '.join(map(usage, kinds))}, module:Class"


def bind_policy(policy: UnboundPolicy, context: PolicyContext) -> Policy:
    """Binds a policy to a model; what a class of the user's decides is checked from then on.

    Raises:
        InputError: If the parameters make no policy of this model.
    """
    return policy.bind(context) if type(policy) in POLICIES else bind_own(policy, context)
