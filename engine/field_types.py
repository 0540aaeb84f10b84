"""Whether the fields of a configuration hold what they are declared to hold; JSON and keywords promise nothing."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flexquant_rl.engine.errors import InputError

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "nothing (null)",
}


def check_field_types(config: Any, prefix: str = "") -> None:
    """Raises InputError on a field of a dataclass, or of one inside it, whose value is of another type than declared.

    An integer is a number too; a truth value is neither. Of literals only the type is checked: their own validation
    lists what there is.

    Args:
        config: The dataclass, its fields annotated with int, float, bool, str, None, Literal, tuple or dataclasses.
        prefix: Before the names of fields in the message, as `env.`.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if is_dataclass(hint) and type(value) is hint:
            check_field_types(value, f"{prefix}{field.name}.")
        elif not _holds(value, hint):
            raise InputError(f"{prefix}{field.name}={shown(value)} must be {_described(hint)}; change its type")


def shown(value: Any) -> str:
    """A value as an error shows it: on one line and not at length."""
    try:
        text = repr(value)
    except Exception as error:  # a stranger's object, or an integer of more digits than Python writes
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_whole_number(value: Any) -> bool:
    """Whether it is an integer; callers of a library hand in what they like, and a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _holds(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_holds(value, kind) for kind in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_holds(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_float(value)
    if hint is int:
        return is_whole_number(value)
    return isinstance(value, hint)


def _is_float(value: float) -> bool:
    try:
        float(value)
    except OverflowError:  # an integer beyond the largest float
        return False
    return True


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list, each item {_described(arguments[0])}"
    return _NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")
