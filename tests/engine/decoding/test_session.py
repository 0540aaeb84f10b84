"""Decoding: steps equal a parallel pass, rows and forks are independent, and a failure leaves a usable session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexquant_rl.engine.decoding.decoder import StepOutput, check_bit_widths
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import active_plan
from flexquant_rl.engine.model import NestedCausalLM

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def random_widths(model: NestedCausalLM, *shape: int, seed: int = 0) -> Tensor:
    """Widths `[*shape, U]` among those that can be asked for, the reference included."""
    allowed = torch.tensor([0, *model.bit_widths])
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), (*shape, model.num_units), generator=generator)]


def all_at(model: NestedCausalLM, bit_width: int) -> Tensor:
    return torch.full((model.num_units,), bit_width)


def assert_identical(first: StepOutput, second: StepOutput, rows: Tensor | slice = slice(None)) -> None:
    for name in ("logits", "residual_update", "crest"):
        assert torch.equal(getattr(first, name)[rows], getattr(second, name)[rows]), name


@contextmanager
def failing(module: nn.Module) -> Iterator[None]:
    """Makes a module raise when called."""

    def fail(*args: object) -> None:
        raise ZeroDivisionError("planted")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


class TestEquivalence:
    @settings(max_examples=25)
    @given(seed=st.integers(0, 10_000), rows=st.integers(1, 3), prompt=st.integers(1, 6), num_steps=st.integers(1, 6))
    def test_steps_equal_one_parallel_pass(
        self, half_unit_model: NestedCausalLM, seed: int, rows: int, prompt: int, num_steps: int
    ) -> None:
        model = half_unit_model
        token_ids = random_ids(rows, prompt + num_steps, seed=seed)
        widths = random_widths(model, rows, prompt + num_steps, seed=seed)
        widths[:, :prompt] = widths[:, :1]  # a prefill runs at one width per row and unit
        session = DecodeSession(model, num_rows=rows)
        stepped = [session.prefill(token_ids[:, :prompt], bit_widths=widths[:, 0]).logits]
        for position in range(prompt, prompt + num_steps):
            stepped.append(session.step(token_ids[:, position], widths[:, position]).logits)
        scored = session.score(token_ids, widths, first=prompt - 1)
        torch.testing.assert_close(torch.stack(stepped, dim=1), scored, **TOLERANCE)
        assert session.lengths.tolist() == [prompt + num_steps] * rows

    def test_past_widths_matter(self, nested_model: NestedCausalLM) -> None:
        """A token's low width stays in the keys and values that later tokens read."""
        token_ids = random_ids(1, 6)
        low_before = torch.full((1, 6, nested_model.num_units), 8)
        low_before[:, :3] = 3
        session = DecodeSession(nested_model)
        clean = session.score(token_ids, all_at(nested_model, 8))[:, -1]
        assert not torch.allclose(session.score(token_ids, low_before)[:, -1], clean, **TOLERANCE)

    def test_score_takes_widths_of_every_rank(self, nested_model: NestedCausalLM) -> None:
        session = DecodeSession(nested_model)
        token_ids = random_ids(2, 5)
        per_unit = random_widths(nested_model)
        scores = [
            session.score(token_ids, per_unit),
            session.score(token_ids, per_unit.expand(2, -1)),
            session.score(token_ids, per_unit.expand(2, 5, -1)),
        ]
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[0], scores[2])
        assert torch.equal(session.score(token_ids), session.score(token_ids, all_at(nested_model, 0)))
        torch.testing.assert_close(session.score(token_ids, per_unit, first=2), scores[0][:, 2:], **TOLERANCE)

    def test_score_in_several_passes(self, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        session = DecodeSession(nested_model)
        token_ids, widths = random_ids(5, 6), random_widths(nested_model, 5, 6)
        whole = session.score(token_ids, widths)
        monkeypatch.setattr("flexquant_rl.engine.decoding.session._SCORE_TOKENS_PER_PASS", 12)
        torch.testing.assert_close(session.score(token_ids, widths), whole, **TOLERANCE)
        torch.testing.assert_close(session.score(token_ids, widths, first=4), whole[:, 4:], **TOLERANCE)

    def test_score_leaves_the_rows_alone(self, nested_model: NestedCausalLM) -> None:
        sessions = [DecodeSession(nested_model), DecodeSession(nested_model)]
        for session in sessions:
            session.prefill(random_ids(1, 4))
        sessions[0].score(random_ids(3, 9, seed=1))
        outputs = [session.step(torch.tensor([7]), all_at(nested_model, 4)) for session in sessions]
        assert_identical(*outputs)

    def test_prefill_runs_at_the_largest_width_by_default(self, nested_model: NestedCausalLM) -> None:
        prompt = random_ids(1, 4)
        outputs = [
            DecodeSession(nested_model).prefill(prompt),
            DecodeSession(nested_model).prefill(prompt, bit_widths=all_at(nested_model, 8)),
        ]
        assert_identical(*outputs)


class TestRows:
    def test_rows_at_different_positions_equal_sessions_of_their_own(self, nested_model: NestedCausalLM) -> None:
        session = DecodeSession(nested_model, num_rows=3, max_length=20)
        alone = [DecodeSession(nested_model, max_length=20) for _ in range(3)]
        for row, length in enumerate((4, 9, 1)):
            prompt = random_ids(1, length, seed=row)
            together = session.prefill(prompt, rows=torch.tensor([row]))
            torch.testing.assert_close(together.logits, alone[row].prefill(prompt).logits, **TOLERANCE)
        assert session.lengths.tolist() == [4, 9, 1]
        for step in range(4):
            widths, tokens = random_widths(nested_model, 3, seed=step), random_ids(3, seed=step)
            output = session.step(tokens, widths)
            for row in range(3):
                expected = alone[row].step(tokens[row : row + 1], widths[row])
                torch.testing.assert_close(output.logits[row : row + 1], expected.logits, **TOLERANCE)
                torch.testing.assert_close(output.crest[row : row + 1], expected.crest, **TOLERANCE)
        assert session.lengths.tolist() == [8, 13, 5]

    @pytest.mark.parametrize("prompt_length", [3, 6, 8], ids=["shorter", "equal", "longer"])
    def test_restarting_rows_leaves_the_others_alone(self, nested_model: NestedCausalLM, prompt_length: int) -> None:
        session = DecodeSession(nested_model, num_rows=4, max_length=20)
        session.prefill(random_ids(4, 4))
        for step in range(2):
            session.step(random_ids(4, seed=step), random_widths(nested_model, 4, seed=step))
        untouched = session.fork()
        restarted = torch.tensor([3, 1])
        prompt = random_ids(2, prompt_length, seed=9)
        output = session.prefill(prompt, rows=restarted)
        assert session.lengths.tolist() == [6, prompt_length, 6, prompt_length]

        others = torch.tensor([0, 2])
        for mine, theirs in zip(session._cache.layers, untouched._cache.layers, strict=True):
            assert torch.equal(mine.keys[others], theirs.keys[others])
            assert torch.equal(mine.values[others], theirs.values[others])
        widths, tokens = random_widths(nested_model, 4, seed=5), random_ids(4, seed=5)
        after, before = session.step(tokens, widths), untouched.step(tokens, widths)
        torch.testing.assert_close(after.logits[others], before.logits[others], **TOLERANCE)

        fresh = DecodeSession(nested_model, num_rows=2)
        assert_identical(output, fresh.prefill(prompt))
        expected = fresh.step(tokens[restarted], widths[restarted])
        torch.testing.assert_close(after.logits[restarted], expected.logits, **TOLERANCE)

    def test_row_does_not_see_what_it_held_before(self, nested_model: NestedCausalLM) -> None:
        session, fresh = (DecodeSession(nested_model, max_length=20) for _ in range(2))
        session.prefill(random_ids(1, 15))
        prompt = random_ids(1, 3, seed=1)
        for one in (session, fresh):
            one.prefill(prompt)
        widths, token = all_at(nested_model, 5), torch.tensor([9])
        assert_identical(session.step(token, widths), fresh.step(token, widths))

    def test_number_of_sequences_must_match(self, nested_model: NestedCausalLM) -> None:
        session = DecodeSession(nested_model, num_rows=2)
        with pytest.raises(ValueError, match="1 sequences were given for 2 rows"):
            session.prefill(random_ids(1, 4))
        session.prefill(random_ids(2, 4))
        with pytest.raises(ValueError, match="3 sequences were given for 2 rows"):
            session.step(random_ids(3), all_at(nested_model, 8))
        with pytest.raises(ValueError, match="2 sequences were given for 1 rows"):
            session.prefill(random_ids(2, 4), rows=torch.tensor([0]))
        assert session.lengths.tolist() == [4, 4]


class TestFork:
    def test_same_action_is_identical(self, nested_model: NestedCausalLM) -> None:
        session = DecodeSession(nested_model, num_rows=2)
        session.prefill(random_ids(2, 5))
        twin = session.fork()
        for step in range(3):
            widths, tokens = random_widths(nested_model, 2, seed=step), random_ids(2, seed=step)
            assert_identical(session.step(tokens, widths), twin.step(tokens, widths))

    def test_different_action_leaves_the_parent_untouched(self, nested_model: NestedCausalLM) -> None:
        session, control = (DecodeSession(nested_model) for _ in range(2))
        for one in (session, control):
            one.prefill(random_ids(1, 5))
        twin = session.fork()
        for step in range(3):  # in turns: a shared cache would hold the twin's entries where the parent has its own
            tokens = random_ids(1, seed=step)
            assert_identical(
                session.step(tokens, all_at(nested_model, 8)), control.step(tokens, all_at(nested_model, 8))
            )
            twin.step(tokens, all_at(nested_model, 3))
        twin.prefill(random_ids(1, 9, seed=7))
        assert session.lengths.tolist() == [8]
        token = torch.tensor([42])
        assert_identical(session.step(token, all_at(nested_model, 8)), control.step(token, all_at(nested_model, 8)))
        twin.close()
        assert session.lengths.tolist() == [9]

    def test_fork_of_an_empty_session(self, nested_model: NestedCausalLM) -> None:
        twin = DecodeSession(nested_model).fork()
        assert twin.lengths.tolist() == [0]
        assert twin.prefill(random_ids(1, 4)).logits.shape == (1, 128)


class TestFailures:
    @pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.self_attn", "lm_head"])
    def test_failed_step_changes_nothing(self, nested_model: NestedCausalLM, where: str) -> None:
        session = DecodeSession(nested_model, num_rows=2)
        session.prefill(random_ids(2, 5))
        session.step(random_ids(2), all_at(nested_model, 4))
        control = session.fork()
        widths, tokens = random_widths(nested_model, 2, seed=3), random_ids(2, seed=3)
        with failing(nested_model.hf_model.get_submodule(where)), pytest.raises(ZeroDivisionError, match="planted"):
            session.step(random_ids(2, seed=8), all_at(nested_model, 3))
        assert active_plan() is None
        assert session.lengths.tolist() == [6, 6]
        assert_identical(session.step(tokens, widths), control.step(tokens, widths))

    @pytest.mark.parametrize(
        ("bit_widths", "match"),
        [
            ([8, 7, 8], "bit-width 7 is not stored; this model holds 3, 4, 5, 6, 8"),
            ([8, 9, 8], "bit-width 9 is not stored"),
            ([8, -1, 8], "bit-width -1 is not stored"),
            ([8, 8], "2 bit-widths were given, but the model has 3 units"),
        ],
    )
    def test_bad_widths_change_nothing(self, nested_model: NestedCausalLM, bit_widths: list[int], match: str) -> None:
        session = DecodeSession(nested_model)
        session.prefill(random_ids(1, 5))
        control = session.fork()
        for run in (
            lambda: session.step(torch.tensor([5]), torch.tensor(bit_widths)),
            lambda: session.prefill(random_ids(1, 4), bit_widths=torch.tensor(bit_widths)),
            lambda: session.score(random_ids(1, 4), torch.tensor(bit_widths)),
        ):
            with pytest.raises(InputError, match=match):
                run()
        assert session.lengths.tolist() == [5]
        widths, token = all_at(nested_model, 8), torch.tensor([5])
        assert_identical(session.step(token, widths), control.step(token, widths))

    def test_failed_restart_leaves_its_rows_empty_and_the_others_alone(self, nested_model: NestedCausalLM) -> None:
        """Their old keys and values are partly overwritten: they must not count any more."""
        session = DecodeSession(nested_model, num_rows=3)
        session.prefill(random_ids(3, 5))
        control = session.fork()
        prompt, rows = random_ids(2, 5, seed=1), torch.tensor([0, 2])
        with failing(nested_model.hf_model.get_submodule("model.layers.1.mlp")), pytest.raises(ZeroDivisionError):
            session.prefill(prompt, rows=rows)
        assert session.lengths.tolist() == [0, 5, 0]
        for one in (session, control):
            one.prefill(prompt, rows=rows)
        widths, tokens = random_widths(nested_model, 3), random_ids(3)
        assert_identical(session.step(tokens, widths), control.step(tokens, widths))

    def test_full_row_is_refused_before_anything_runs(self, nested_model: NestedCausalLM) -> None:
        session = DecodeSession(nested_model, num_rows=2, max_length=6)
        session.prefill(random_ids(1, 5), rows=torch.tensor([0]))
        session.prefill(random_ids(1, 2), rows=torch.tensor([1]))
        widths = all_at(nested_model, 8)
        session.step(random_ids(2), widths)
        with pytest.raises(InputError, match="7 tokens do not fit into a row of 6"):
            session.step(random_ids(2), widths)
        assert session.lengths.tolist() == [6, 3]
        session.prefill(random_ids(1, 2), rows=torch.tensor([0]))
        session.step(random_ids(2), widths)
        assert session.lengths.tolist() == [3, 4]

    def test_prompt_must_fit_and_not_be_empty(self, nested_model: NestedCausalLM) -> None:
        with pytest.raises(InputError, match="129 tokens .* context holds 128"):
            DecodeSession(nested_model, max_length=129)
        session = DecodeSession(nested_model, max_length=8)
        with pytest.raises(InputError, match="9 tokens do not fit into a row of 8"):
            session.prefill(random_ids(1, 9))
        with pytest.raises(InputError, match="the prompt is empty"):
            session.prefill(random_ids(1, 0))
        session.prefill(random_ids(1, 8))
        assert session.lengths.tolist() == [8]

    @pytest.mark.parametrize(("length", "first"), [(0, 0), (129, 0), (5, 5), (5, 6), (5, -1)])
    def test_score_must_have_something_within_the_context(
        self, nested_model: NestedCausalLM, length: int, first: int
    ) -> None:
        with pytest.raises(InputError, match=f"{length} tokens, logits from position {first}"):
            DecodeSession(nested_model).score(random_ids(1, length), first=first)

    def test_close_is_idempotent_and_final(self, nested_model: NestedCausalLM) -> None:
        session = DecodeSession(nested_model)
        session.prefill(random_ids(1, 4))
        session.close()
        session.close()
        for run in (
            lambda: session.prefill(random_ids(1, 4)),
            lambda: session.step(torch.tensor([5]), all_at(nested_model, 8)),
            session.fork,
            lambda: session.lengths,
        ):
            with pytest.raises(RuntimeError, match="closed"):
                run()


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 12), min_size=1, max_size=5))
def test_check_accepts_exactly_the_stored_widths_and_the_reference(widths: list[int]) -> None:
    stored = (3, 5, 8)
    if set(widths) <= {0, *stored}:
        check_bit_widths(torch.tensor([widths]), stored, len(widths))
        return
    with pytest.raises(InputError, match="is not stored; this model holds 3, 5, 8"):
        check_bit_widths(torch.tensor([widths]), stored, len(widths))
