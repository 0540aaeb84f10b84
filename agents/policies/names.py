"""Parameters of policies as text: `family:key=value,key=value`, or `family:value` for the first parameter alone."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

from flexquant_rl.agents.policies.unbound import Family, PolicyParameters
from flexquant_rl.engine.errors import InputError

_Policy = TypeVar("_Policy", bound=PolicyParameters)

Parameter = int | float | bool | str
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_EXAMPLES = {int: "4", float: "4.5", bool: "true", str: "text"}
EXAMPLE = "example"
"""Key of a field's metadata that has a value of its own to show where it is missing or wrong."""


def policy_name(policy: PolicyParameters) -> str:
    """The shortest name that means these parameters: those at their defaults are left out.

    The first parameter stands without its key, e.g. `fixed:4` or `entropy:1.5,one_way=true`.

    Raises:
        InputError: If a value is text that a name cannot give back: with a comma, or spaces around it.
    """
    items = []
    for index, field in enumerate(_parameters(type(policy))):
        value = getattr(policy, field.name)
        if value != field.default:
            _check_text(field.name, value)
            is_short = index == 0 and not isinstance(value, str)
            items.append(_printed(value) if is_short else f"{field.name}={_printed(value)}")
    return ":".join([prefix(type(policy)), *([",".join(items)] if items else [])])


def _check_text(key: str, value: Parameter) -> None:
    """Raises InputError if a value is text that `read_parameters` would cut."""
    if isinstance(value, str) and ("," in value or value != value.strip()):
        raise InputError(
            f"{key}={value!r} cannot be part of a policy's name, which is cut at commas and stripped of spaces; leave "
            "them out"
        )


def prefix(kind: type[PolicyParameters]) -> str:
    """What the names of a class of policies begin with: its family, or where to import it from."""
    family = vars(kind).get("family")  # not an inherited one: a class of the user's may extend one of ours
    return family.name if isinstance(family, Family) else f"{kind.__module__}:{kind.__qualname__}"


def usage(kind: type[PolicyParameters]) -> str:
    """How the names of a class of policies are written, e.g. `fixed:BIT_WIDTH`, or `lookups` where none is needed."""
    parameters = _parameters(kind)
    is_needed = bool(parameters) and parameters[0].default is MISSING
    return f"{prefix(kind)}:{parameters[0].name.upper()}" if is_needed else prefix(kind)


def read_parameters(kind: type[_Policy], text: str, name: str) -> _Policy:
    """Makes a policy from the part of its name behind the prefix.

    Args:
        kind: Its class.
        text: `value,key=value,...`; empty for the defaults.
        name: The whole name, for messages.

    Raises:
        InputError: If a key is unknown, missing or given twice, if a value is not of its key's type or not finite, or
            if the class refuses the values.
    """
    known = {field.name: field for field in _parameters(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Parameter] = {}
    for index, item in enumerate(text.split(",") if text else ()):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator and index == 0 and known:
            key, value = next(iter(known)), key
        elif not separator:
            raise InputError(f"policy {name!r}: {item.strip()!r} is not key=value; {_keys(kind)}")
        if key not in known:
            raise InputError(f"policy {name!r}: unknown key {key!r}; {_keys(kind)}")
        if key in values:
            raise InputError(f"policy {name!r}: {key} is given twice; leave one of them out")
        example = known[key].metadata.get(EXAMPLE, _EXAMPLES[hints[key]])
        values[key] = _read_value(hints[key], key, value, name, example)
    for key, field in known.items():
        if key not in values and field.default is MISSING and field.default_factory is MISSING:
            example = field.metadata.get(EXAMPLE, _EXAMPLES[hints[key]])
            short = f"{prefix(kind)}:{example}" if key == next(iter(known)) else f"{key}={example}"
            raise InputError(f"policy {name!r}: {key} is missing; write e.g. {short}")
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"policy {name!r}: {error}") from error


def check_parameters(kind: type[PolicyParameters], name: str) -> None:
    """Raises InputError if a field of a class has a type that no text is read as."""
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise InputError(f"policy {name!r}: the types of its fields cannot be read ({error}); import them") from error
    for field in _parameters(kind):
        if hints[field.name] not in _KINDS:
            raise InputError(
                f"policy {name!r}: its field {field.name} is of type {field.type}, which names cannot give; use int, "
                "float, bool or str, or field(init=False)"
            )


def _parameters(kind: type[PolicyParameters]) -> list[Field[Any]]:
    return [field for field in fields(kind) if field.init]


def _keys(kind: type[PolicyParameters]) -> str:
    names = ", ".join(field.name for field in _parameters(kind))
    return f"{prefix(kind)} has {names}" if names else f"{prefix(kind)} has no parameters"


def _read_value(kind: type[Parameter], key: str, text: str, name: str, example: str) -> Parameter:
    try:
        value = _true_or_false(text) if kind is bool else kind(text)
    except ValueError as error:
        raise InputError(
            f"policy {name!r}: {key}={text!r} is not {_KINDS[kind]}; write e.g. {key}={example}"
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"policy {name!r}: {key}={text!r} is not finite; write e.g. {key}={example}")
    return value


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _printed(value: Parameter) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
