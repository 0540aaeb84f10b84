"""Policies of the user's own: found from the current directory, bound like ours, and checked at every call."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from policy_checks import check_protocol, fake_context

from flexquant_rl.agents.policies.families import bind_policy, family_name, parse_policy
from flexquant_rl.agents.policies.names import policy_name
from flexquant_rl.engine.control.decision import PositionPolicy, StaticAllocation
from flexquant_rl.engine.errors import InputError

HEAD = """
from dataclasses import dataclass, field
import torch
from flexquant_rl.agents.policies.fixed import Fixed
from flexquant_rl.agents.policies.unbound import PolicyContext, RulePolicy
from flexquant_rl.engine.control.decision import Decision, Policy, PositionPolicy, StaticAllocation
"""
GOOD = """
@dataclass(frozen=True)
class Alternating:
    first: int = 8
    second: int = 4

    def bind(self, context: PolicyContext) -> Policy:
        units = torch.arange(context.schema.num_units)
        widths = torch.where(units % 2 == 0, self.first, self.second)
        return RulePolicy("mine", lambda signals: Decision(widths.expand(len(signals), -1)))
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module into the current directory and gives its name, which no other test has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def module(source: str) -> str:
        name = f"own_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text(HEAD + textwrap.dedent(source), encoding="utf-8")
        return name

    before = {*sys.modules}
    yield module
    for added in {*sys.modules} - before:
        if added.startswith("own_"):
            del sys.modules[added]


def error_of(name: str) -> str:
    """The one line that a name or its policy ends with."""
    with pytest.raises(InputError) as error:
        bind_policy(parse_policy(name), fake_context())(torch.zeros(2, fake_context().schema.dim))
    message = str(error.value)
    assert message.startswith(f"policy {name!r}: ")
    assert "\n" not in message
    return message


def test_a_class_by_its_name(write: Write) -> None:
    name = f"{write(GOOD)}:Alternating"
    for text, widths in ((name, [8, 4, 8, 4]), (f"{name}:6", [6, 4, 6, 4]), (f"{name}:first=3,second=5", [3, 5, 3, 5])):
        unbound = parse_policy(text)
        check_protocol(unbound)
        policy = bind_policy(unbound, fake_context())
        assert policy(torch.zeros(1, fake_context().schema.dim)).bit_widths.tolist() == [widths]
        assert parse_policy(policy_name(unbound)) == unbound
        assert family_name(unbound) == name
    assert policy.name == f"{name}:3,second=5", "not the name that its own code gives it"
    assert error_of(f"{name}:first=x").endswith("first='x' is not a whole number; write e.g. first=4")


def test_modules_in_packages(write: Write, tmp_path: Path) -> None:
    name = write(GOOD)
    (tmp_path / f"{name}_package").mkdir()
    (tmp_path / f"{name}.py").rename(tmp_path / f"{name}_package" / "inner.py")
    check_protocol(parse_policy(f"{name}_package.inner:Alternating"))


def test_a_family_of_ours_comes_before_a_module(write: Write, tmp_path: Path) -> None:
    (tmp_path / f"{write(GOOD)}.py").rename(tmp_path / "knapsack.py")
    assert "mean_bit_width='Alternating' is not a number" in error_of("knapsack:Alternating")


def test_a_static_allocation_stays_one(write: Write) -> None:
    source = """
    @dataclass(frozen=True)
    class Halved(Fixed):
        def bind(self, context: PolicyContext) -> Policy:
            return StaticAllocation("x", torch.tensor([self.bit_width, 8, 8, 8]))
    """
    name = f"{write(source)}:Halved"
    policy = bind_policy(parse_policy(f"{name}:4"), fake_context())
    assert isinstance(policy, StaticAllocation), "controllers then need no signals"
    assert policy.name == f"{name}:4", "a class that extends one of ours has a family of its own"
    assert "it chose width 7" in error_of(f"{name}:7")


def test_a_choice_by_position_stays_one(write: Write) -> None:
    source = """
    @dataclass(frozen=True)
    class Falling:
        last: int

        def bind(self, context: PolicyContext) -> Policy:
            def at(positions):
                return torch.where(positions[:, None] < 3, 8, self.last).expand(-1, 4)

            return PositionPolicy("x", at, context.schema.tokens_decoded)
    """
    name = f"{write(source)}:Falling"
    policy = bind_policy(parse_policy(f"{name}:4"), fake_context())
    assert isinstance(policy, PositionPolicy), "controllers then need no signals"
    assert policy.name == f"{name}:4"
    assert policy.at(torch.tensor([0, 5])).tolist() == [[8] * 4, [4] * 4]
    wrong = bind_policy(parse_policy(f"{name}:7"), fake_context())
    assert isinstance(wrong, PositionPolicy)
    with pytest.raises(InputError, match="it chose width 7, which is not stored"):
        wrong.at(torch.tensor([5]))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("torch.full((len(signals), 4), 8)", "it returned Tensor; return Decision(bit_widths)"),
        ("Decision([[8, 8, 8, 8]])", "it returned Decision; return Decision(bit_widths) with a tensor"),
        ("Decision(torch.full((4,), 8))", "its widths are [4] torch.int64; return [B, U] = [2, 4] torch.int64"),
        ("Decision(torch.full((1, 4), 8))", "its widths are [1, 4] torch.int64"),
        ("Decision(torch.full((len(signals), 4), 8.0))", "its widths are [2, 4] torch.float32"),
        ("Decision(torch.full((len(signals), 4), 7))", "it chose width 7, which is not stored; choose one of 3, 4, 5,"),
        ("Decision(torch.full((len(signals), 4), 0))", "it chose width 0"),
        ("Decision(torch.full((len(signals), 4), -1))", "it chose width -1"),
        ("Decision(torch.full((len(signals), 4), 2**40))", "it chose width 1099511627776"),
    ],
)
def test_wrong_decisions(write: Write, result: str, message: str) -> None:
    source = f"""
    @dataclass(frozen=True)
    class Wrong:
        def bind(self, context: PolicyContext) -> Policy:
            return RulePolicy("wrong", lambda signals: {result})
    """
    assert message in error_of(f"{write(source)}:Wrong")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Mine: ...", "Mine is not a policy; make it a frozen dataclass with a method bind(context)"),
        ("Mine = 3", "Mine is not a policy"),
        ("@dataclass(frozen=True)\nclass Mine: ...", "Mine is not a policy"),
        ("@dataclass\nclass Mine:\n  def bind(self, context): ...", "Mine can change; write @dataclass(frozen=True)"),
        ("", "has no class Mine; check the name"),
        (
            "@dataclass(frozen=True)\nclass Mine:\n  family = Fixed.family\n  def bind(self, context): ...",
            "Mine has a family",
        ),
        (
            "@dataclass(frozen=True)\nclass Mine:\n  widths: tuple = ()\n  def bind(self, context): ...",
            "its field widths is of type",
        ),
        (
            "@dataclass(frozen=True)\nclass Mine:\n  width: 'Missing' = 4\n  def bind(self, context): ...",
            "cannot be read (name 'Missing' is not defined)",
        ),
        ("@dataclass(frozen=True)\nclass Mine:\n  def bind(self, context): ...", "bind returned NoneType"),
        ("x = undefined", "fails with NameError: name 'undefined' is not defined (line 7 of "),
        ("import no_such_package", "fails with ModuleNotFoundError: No module named 'no_such_package' (line 7 of "),
        ("x = (", "fails with SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "fails with SystemExit: 3 (line 7 of "),
    ],
)
def test_no_policy(write: Write, source: str, message: str) -> None:
    assert message in error_of(f"{write(source)}:Mine")


@pytest.mark.parametrize("name", ["no_such_module:Mine", "no_such_package.module:Mine", "no_such_module.py:Mine"])
def test_no_such_module(write: Write, name: str) -> None:
    with pytest.raises(InputError) as error:
        parse_policy(name)
    assert f"unknown policy {name!r}; there is no module {name.partition(':')[0]} here" in str(error.value)
