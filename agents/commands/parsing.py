"""From arguments to options: `tyro` reads dataclasses; here is what its help shows of defaults and choices."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

T = TypeVar("T")
_MIN_COLUMNS = 40
"""Narrower terminals get the help of this width; below 8 the layout fails."""


def parse(options: type[T], prog: str, description: str | None, arguments: Sequence[str]) -> T:
    """Reads the options of one command; prints help or usage errors, and exits, where they are asked for or due."""
    _widen_terminal()
    with _registry():
        return tyro.cli(options, prog=prog, description=description, args=list(arguments))


def parse_command(
    prog: str, version: str, description: str, commands: Mapping[str, type[Any]], arguments: Sequence[str]
) -> tuple[str, Any]:
    """Reads the name of a command and its options.

    Args:
        prog: Name of the program.
        version: What `--version` prints behind it.
        description: What its help says first.
        commands: Options by command.
        arguments: As given on the command line.

    Returns:
        The command's name and its options.
    """
    if list(arguments) == ["--version"]:
        print(f"{prog} {version}")
        sys.exit(0)
    if arguments and arguments[0] in commands:
        # Only this command's parser is built.
        name = arguments[0]
        return name, parse(commands[name], f"{prog} {name}", None, arguments[1:])
    _widen_terminal()
    with _registry():
        found = tyro.extras.subcommand_cli_from_dict(
            {name: _summary(options) for name, options in commands.items()},
            prog=prog,
            description=description,
            args=list(arguments),
        )
    raise AssertionError(f"{found} is no command, and tyro has not said so")


def _summary(options: type[Any]) -> type[Any]:
    """A command without options, for the list of commands: its first paragraph."""
    return dataclasses.make_dataclass(options.__name__, [], namespace={"__doc__": options.__doc__})


def _widen_terminal() -> None:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) < _MIN_COLUMNS:
        os.environ["COLUMNS"] = str(_MIN_COLUMNS)


def _registry() -> ConstructorRegistry:
    """Shows options that may be left out by what they take, not by `None`."""
    registry = ConstructorRegistry()
    busy = False

    @registry.struct_rule
    def plain(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal busy
        if busy or not dataclasses.is_dataclass(info.type):
            return None
        busy = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            busy = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = tuple(dataclasses.replace(field, type=_plain_type(field.type, field.default)) for field in spec.fields)
        return dataclasses.replace(spec, fields=fields)

    return registry


def _plain_type(kind: Any, default: object) -> Any:
    """The type of an option with what its help shows: no `None` among the choices, no empty default."""
    hidden = {"help_behavior_hint": ""} if default is None or default == () else {}
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    alternatives = [item for item in get_args(inner) if item is not type(None)]
    is_optional = len(alternatives) == 1 and type(None) in get_args(inner)
    metavar = {"metavar": _metavar(alternatives[0])} if is_optional else {}
    if not hidden and not metavar:
        return kind
    configured = tyro.conf.arg(**metavar, **hidden)  # type: ignore[call-overload]
    # The field's own annotations come last, and win.
    return Annotated[(inner, configured, *get_args(kind)[1:])] if inner is not kind else Annotated[inner, configured]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return str(getattr(kind, "__name__", kind)).upper()
