"""A policy by the token about to be read: a look-up that decides as its network would, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_session import FakeModel
from torch import Tensor

from flexquant_rl.engine.control.artefact import load_policy, save_policy
from flexquant_rl.engine.control.controller import TokenController, make_controller
from flexquant_rl.engine.control.decision import looks
from flexquant_rl.engine.control.policy import PolicyCard
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.signals import SIGNAL_LIMIT, SignalSchema, project_embedding
from flexquant_rl.engine.control.token_policy import ImportanceNet, TokenPolicy
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM

NOTHING = torch.zeros(0)
UNSEEN = StepOutput(NOTHING, NOTHING, NOTHING)
"""A step's output that cannot be looked at."""


def random_policy(model: FakeModel | NestedCausalLM, seed: int = 0) -> TokenPolicy:
    """Four allocations, and a network that tells tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    card = PolicyCard.of_model(model, {})
    net = ImportanceNet(card.schema.num_embedding_dims)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    widths = torch.tensor(model.bit_widths)
    allocations = widths[torch.randint(len(widths), (4, model.num_units), generator=generator)]
    return TokenPolicy(net, allocations, torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64), card)


def signals_of(schema: SignalSchema, projected: Tensor, dials: Tensor) -> Tensor:
    """Signals with everything else at random."""
    signals = torch.randn(len(projected), schema.dim, generator=torch.Generator().manual_seed(9))
    signals[:, schema.embedding_columns] = projected.clamp(-SIGNAL_LIMIT, SIGNAL_LIMIT)
    signals[:, schema.index("dial")] = dials.log10()
    return signals


def test_the_price_of_a_token_chooses_its_allocation() -> None:
    policy = random_policy(FakeModel())
    torch.nn.init.zeros_(policy.net.layers[2].weight)  # type: ignore[arg-type]
    torch.nn.init.constant_(policy.net.layers[2].bias, 0.0)  # type: ignore[arg-type]
    schema = policy.card.schema
    dials = torch.tensor([0.4, 0.6, 3.0, 4.5])
    nothing = torch.zeros(4, schema.num_embedding_dims)
    assert torch.equal(policy(signals_of(schema, nothing, dials)).bit_widths, policy.bit_widths)
    torch.nn.init.constant_(policy.net.layers[2].bias, 2.0)  # type: ignore[arg-type]
    policy.net.exponent.fill_(0.5)
    dials = dials / torch.e  # e^(0.5 * 2) times as much
    assert torch.equal(policy(signals_of(schema, nothing, dials)).bit_widths, policy.bit_widths)
    assert not looks(policy)


@pytest.mark.parametrize("seed", range(3))
def test_the_table_decides_as_the_network(nested_model: NestedCausalLM, seed: int) -> None:
    policy = random_policy(nested_model, seed)
    controller = make_controller(nested_model, policy, None, num_rows=5)
    assert isinstance(controller, TokenController)
    projected = project_embedding(nested_model.embedding_matrix(), policy.card.schema.num_embedding_dims)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(projected), (5,), generator=generator)
    dials = 10 ** (2 * torch.rand(5, generator=generator) - 1)
    controller.reset(UNSEEN, tokens, dials)
    seen = set()
    for _ in range(20):
        expected = policy(signals_of(policy.card.schema, projected[tokens], dials)).bit_widths
        found = controller.decide().bit_widths
        assert torch.equal(found, expected)
        seen |= set(map(tuple, found.tolist()))
        tokens = torch.randint(len(projected), (5,), generator=generator)
        controller.update(UNSEEN, found, tokens)
    assert len(seen) > 1


def test_rows_restart_and_roll_back_by_themselves(nested_model: NestedCausalLM) -> None:
    policy = random_policy(nested_model)
    one, many = (make_controller(nested_model, policy, None, num_rows=count) for count in (1, 3))
    tokens, dials = torch.tensor([5, 6, 7]), torch.tensor([0.3, 1.0, 3.0])
    many.reset(UNSEEN, tokens, dials)

    def alone(token: int, dial: float) -> Tensor:
        one.reset(UNSEEN, torch.tensor([token]), torch.tensor([dial]))
        return one.decide().bit_widths

    mark = many.mark()
    rows = torch.tensor([2, 0])
    many.update(UNSEEN, NOTHING, torch.tensor([8, 9]), rows)
    assert torch.equal(many.decide(rows).bit_widths, torch.cat([alone(8, 3.0), alone(9, 0.3)]))
    many.rollback(mark, torch.tensor([2]))
    assert torch.equal(many.decide().bit_widths, torch.cat([alone(9, 0.3), alone(6, 1.0), alone(7, 3.0)]))
    many.reset(UNSEEN, torch.tensor([4]), torch.tensor([9.0]), torch.tensor([1]))
    assert torch.equal(many.decide(torch.tensor([1])).bit_widths, alone(4, 9.0))
    many.rollback(mark)
    assert torch.equal(many.decide().bit_widths, torch.cat([alone(5, 0.3), alone(6, 1.0), alone(7, 3.0)]))


def test_round_trip(nested_model: NestedCausalLM, profile: Profile, tmp_path: Path) -> None:
    policy = random_policy(nested_model)
    save_policy(policy, profile, tmp_path / "kept")
    found = load_policy(tmp_path / "kept", model_fingerprint=nested_model.fingerprint)
    assert isinstance(found, TokenPolicy)
    assert (found.name, found.card) == ("kept", policy.card)
    signals = torch.randn(100, policy.card.schema.dim, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found(signals).bit_widths, policy(signals).bit_widths)
    assert found.table(nested_model.embedding_matrix()) is found.table(nested_model.embedding_matrix())
    assert torch.equal(found.needs(nested_model.embedding_matrix()), policy.needs(nested_model.embedding_matrix()))
    with pytest.raises(InputError, match="was trained for model"):
        load_policy(tmp_path / "kept", model_fingerprint="0" * 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bit_widths": torch.tensor([[3, 4, 8], [3, 4, 7], [8, 8, 8], [8, 8, 8]])}, "widths that are not stored"),
        ({"bit_widths": torch.tensor([3, 4, 8])}, r"its allocations are \[3\]"),
        ({"bit_widths": torch.ones(4, 3)}, "float32"),
        ({"prices": torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64)}, "prices do not ascend"),
        ({"prices": torch.tensor([1.0, float("nan"), 4.0], dtype=torch.float64)}, "prices do not ascend"),
        ({"prices": torch.tensor([1.0, 2.0], dtype=torch.float64)}, "one of 4 allocations"),
        ({"prices": torch.tensor([1.0, 2.0, 3.0])}, "prices do not ascend"),
    ],
)
def test_what_is_no_policy_is_refused(
    nested_model: NestedCausalLM, profile: Profile, tmp_path: Path, change: dict[str, Tensor], reason: str
) -> None:
    policy = random_policy(nested_model)
    for name, tensor in change.items():
        setattr(policy, name, tensor)
    save_policy(policy, profile, tmp_path / "broken")
    with pytest.raises(InputError, match=f"not a whole policy by tokens .*{reason}.*fq export") as error:
        load_policy(tmp_path / "broken")
    assert "\n" not in str(error.value)
