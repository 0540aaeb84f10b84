"""The GPU's passes over several tokens, and rounds of drafts on them, under Triton's interpreter where there is no GPU.

As in `test_graph_decode.py` most tests put the product's definition in its place. Everything else is the kernels' own,
so that what is compared bit for bit here is their order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import make_controller
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.drafts import DraftPolicy, RoundState
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import PolicyRunner
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.decoding import graph_rows
from flexquant_rl.engine.decoding.decoder import ExtendOutput, StepOutput
from flexquant_rl.engine.decoding.graph_choice import why_not_graph
from flexquant_rl.engine.decoding.graph_decode import GraphDecoder
from flexquant_rl.engine.decoding.graph_session import GraphModel, GraphSession
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine, generate

pytest.importorskip("triton")

Build = Callable[..., NestedCausalLM]
Output = StepOutput | ExtendOutput


def exact(model: NestedCausalLM, **options: Any) -> GraphModel:
    """Float32 throughout, and caches of 8, 16, 32, ... tokens."""
    return GraphModel(model, **({"mode": "float", "cache_dtype": torch.float32, "first_bucket": 8} | options))


def make_profile(model: NestedCausalLM) -> Profile:
    zeros = torch.zeros(model.num_units, len(model.bit_widths))
    return Profile(roofline_cost(model), zeros, model.bit_widths, model.fingerprint, 10, "unquantised")


def tokens_of(model: NestedCausalLM, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def widths_of(model: NestedCausalLM, *shape: int, seed: int = 0) -> Tensor:
    picks = torch.randint(
        len(model.bit_widths), (*shape, model.num_units), generator=torch.Generator().manual_seed(seed)
    )
    return torch.tensor(model.bit_widths)[picks]


def all_at(model: NestedCausalLM, bit_width: int) -> Tensor:
    return torch.full((model.num_units,), bit_width)


def parts_of(output: Output) -> dict[str, Tensor]:
    return {name: getattr(output, name).cpu() for name in ("logits", "residual_update", "crest")}


def assert_equal(actual: Output, expected: Output) -> None:
    for (name, ours), theirs in zip(parts_of(actual).items(), parts_of(expected).values(), strict=True):
        assert torch.equal(ours, theirs), name


def assert_close(actual: Output, expected: Output, tolerance: float) -> None:
    for ours, theirs in zip(parts_of(actual).values(), parts_of(expected).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def singly(session: GraphSession, tokens: Tensor, widths: Tensor, rows: Tensor | None = None) -> ExtendOutput:
    outputs = [session.step(column, widths, rows=rows) for column in tokens.unbind(1)]
    columns = zip(*(parts_of(output).values() for output in outputs), strict=True)
    return ExtendOutput(*(torch.stack(column, 1) for column in columns))


@pytest.mark.usefixtures("quick", "poison_empty")
class TestExtend:
    @pytest.mark.parametrize(
        ("family", "mode", "cache_dtype"),
        [("llama", "float", torch.float32), ("qwen3", "int8", torch.float16)],
    )
    def test_many_tokens_have_the_bits_of_single_steps(
        self, family: str, mode: str, cache_dtype: torch.dtype, build: Build
    ) -> None:
        """Rounds of 2, 3 and 6 tokens (padded to 4 and 8), widths of their own, over the borders of two buckets."""
        model = build(family)
        shared = exact(model, mode=mode, cache_dtype=cache_dtype)
        together, alone = GraphSession(shared), GraphSession(shared)
        prompt = tokens_of(model, 1, 6)
        assert_equal(together.prefill(prompt), alone.prefill(prompt))
        for seed, count in enumerate((2, 3, 6)):
            tokens, widths = tokens_of(model, 1, count, seed=seed), widths_of(model, seed=seed)
            assert_equal(together.extend(tokens, widths), singly(alone, tokens, widths))
        assert together.lengths.tolist() == alone.lengths.tolist() == [17]
        assert set(together._open().buckets) == {8, 16, 32}

    def test_a_step_has_the_bits_of_the_captured_loop(self, build: Build) -> None:
        """The one that decodes plain text, over two buckets; its first token is the prompt's."""
        model = build("qwen2", num_hidden_layers=1)
        options: dict[str, Any] = {"mode": "int8", "cache_dtype": torch.float16, "first_bucket": 8}
        plain = StaticAllocation("plain", all_at(model, 6))
        loop = GraphDecoder(model, plain, make_profile(model), **options)
        session, prompt = GraphSession(exact(model, **options)), tokens_of(model, 1, 7)
        loop.start(prompt[0], 4, kl_weight=1.0)
        assert torch.equal(loop.loop.logits, session.prefill(prompt).logits)
        for _ in range(3):
            token = loop.loop.book.token.cpu().clone()
            loop.loop.advance(1)
            assert torch.equal(loop.loop.logits, session.step(token, all_at(model, 6)).logits)

    def test_a_pass_of_sixteen_and_more(self, build: Build) -> None:
        model = build("llama", num_hidden_layers=1)
        shared = exact(model, mode="int8", first_bucket=64)
        together, alone = GraphSession(shared), GraphSession(shared)
        prompt, tokens, widths = tokens_of(model, 1, 3), tokens_of(model, 1, 18, seed=1), all_at(model, 8)
        for session in (together, alone):
            session.prefill(prompt)
        assert_equal(together.extend(tokens, widths), singly(alone, tokens, widths))
        assert sorted(together._open().buckets[64].parts) == [2, 16]

    def test_follows_hugging_face(self, build: Build) -> None:
        model = build("qwen2")
        session, reference = GraphSession(exact(model)), DecodeSession(model)
        prompt, tokens = tokens_of(model, 1, 7), tokens_of(model, 1, 4, seed=1)
        widths = widths_of(model, 1)
        assert_close(session.prefill(prompt), reference.prefill(prompt), 1e-4)
        assert_close(session.extend(tokens, widths), reference.extend(tokens, widths), 1e-3)
        for decoder in (session, reference):
            decoder.truncate(torch.tensor([9]))
        again = tokens_of(model, 1, 2, seed=2)
        assert_close(session.extend(again, widths), reference.extend(again, widths), 1e-3)

    def test_an_unquantised_head_differs_by_rounding_alone(self, build: Build) -> None:
        model = build("llama", quantize_head=False, num_hidden_layers=1)
        shared = exact(model)
        together, alone = GraphSession(shared), GraphSession(shared)
        for session in (together, alone):
            session.prefill(tokens_of(model, 1, 4))
        tokens = tokens_of(model, 1, 3, seed=1)
        output, steps = (read(tokens, all_at(model, 5)) for read in (together.extend, lambda *a: singly(alone, *a)))
        assert_close(output, steps, 1e-5)
        assert torch.equal(output.residual_update.cpu(), steps.residual_update)

    def test_padding_and_what_is_beyond_a_row_count_nothing(
        self, build: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NaN in the padding's embedding and in every place that no kept token has written."""
        model = build("llama", num_hidden_layers=1)
        shared = exact(model, first_bucket=32)
        clean, poisoned = GraphSession(shared), GraphSession(shared)
        prompt, tokens, widths = tokens_of(model, 1, 5), tokens_of(model, 1, 3, seed=1), widths_of(model)
        for session in (clean, poisoned):
            session.prefill(prompt)
        expected = clean.extend(tokens, widths)
        monkeypatch.setattr(graph_rows, "PADDING_TOKEN", 2)
        tokens_without = tokens.masked_fill(tokens == 2, 3)
        assert torch.equal(tokens_without, tokens)
        shared.passes.weights.embedding[2] = torch.nan
        poisoned._open().buckets[32].cache[:, :, :, :, 5:] = torch.nan
        assert_equal(poisoned.extend(tokens, widths), expected)
        held, beyond = poisoned._open().buckets[32].cache.split([8, 24], dim=4)
        assert bool(held.isfinite().all()), "keys and values of all three tokens are there"
        assert bool(beyond.isnan().all()), "and nothing else was written"
        assert torch.equal(held, clean._open().buckets[32].cache[:, :, :, :, :8])
        assert int(poisoned._open().lengths) == 8

    def test_what_is_cut_off_had_never_been_there(self, build: Build) -> None:
        """Back over the borders of two buckets, whose rest is NaN then."""
        model = build("llama", num_hidden_layers=1)
        shared = exact(model)
        cut, fresh = GraphSession(shared), GraphSession(shared)
        prompt, drafts = tokens_of(model, 1, 7), tokens_of(model, 1, 10, seed=1)
        for session in (cut, fresh):
            session.prefill(prompt)
        cut.extend(drafts, all_at(model, 3))
        assert cut.lengths.tolist() == cut._open().lengths.tolist() == [17]
        cut.truncate(torch.tensor([7]))
        assert cut.lengths.tolist() == cut._open().lengths.tolist() == [7]
        for bucket in cut._open().buckets.values():
            bucket.cache[:, :, :, :, 7:] = torch.nan
        tokens, widths = tokens_of(model, 1, 4, seed=2), widths_of(model)
        assert_equal(cut.extend(tokens, widths), fresh.extend(tokens, widths))
        cut.truncate(torch.tensor([0]))
        assert_equal(cut.prefill(prompt), fresh.prefill(prompt))

    def test_rows_do_not_see_each_other(self, build: Build) -> None:
        model = build("llama", num_hidden_layers=1)
        shared = exact(model)
        batch, alone = GraphSession(shared, num_rows=2), [GraphSession(shared) for _ in range(2)]
        for row, length in enumerate((3, 9)):
            prompt = tokens_of(model, 1, length, seed=row)
            assert_equal(batch.prefill(prompt, rows=torch.tensor([row])), alone[row].prefill(prompt))
        tokens, widths = tokens_of(model, 2, 3, seed=2), widths_of(model, 2)
        rows = torch.tensor([1, 0])
        output = batch.extend(tokens, widths, rows=rows)
        for place, row in enumerate(rows.tolist()):
            own = slice(place, place + 1)
            part = ExtendOutput(output.logits[own], output.residual_update[own], output.crest[own])
            assert_equal(part, alone[row].extend(tokens[own], widths[own]))
        batch.truncate(torch.tensor([4, 12]))
        alone[0].truncate(torch.tensor([4]))
        twin = batch.fork()
        column = tokens_of(model, 2, seed=3)
        output = batch.step(column, widths)
        assert_equal(twin.step(column, widths), output)
        for row in range(2):
            own = slice(row, row + 1)
            part = StepOutput(output.logits[own], output.residual_update[own], output.crest[own])
            assert_equal(part, alone[row].step(column[own], widths[own]))

    def test_a_failed_pass_leaves_the_rows_as_they_were(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build("llama", num_hidden_layers=1)
        session = GraphSession(exact(model), num_rows=2)
        session.prefill(tokens_of(model, 2, 4))
        read, calls = session._graph_model.passes.read, []

        def fails_at_the_second(*args: Any) -> tuple[Tensor, Tensor]:
            calls.append(args)
            if len(calls) == 2:
                raise MemoryError
            return read(*args)

        monkeypatch.setattr(session._graph_model.passes, "read", fails_at_the_second)
        with pytest.raises(MemoryError):
            session.extend(tokens_of(model, 2, 2), all_at(model, 4))
        assert session.lengths.tolist() == session._open().lengths.tolist() == [4, 4]

    def test_caches_are_handed_on(self, build: Build) -> None:
        """With the graphs that are bound to them: nothing is captured for the next request."""
        model = build("llama", num_hidden_layers=1)
        shared = exact(model)
        first = GraphSession(shared)
        held = first._open()
        prompt, tokens = tokens_of(model, 1, 4), tokens_of(model, 1, 2, seed=1)
        first.prefill(prompt)
        expected = first.extend(tokens, all_at(model, 4))
        first.close()
        first.close()
        wider, second = GraphSession(shared, num_rows=2), GraphSession(shared)
        assert second._open() is held
        assert wider._open() is not held
        assert second.lengths.tolist() == second._open().lengths.tolist() == [0]
        second.prefill(prompt)
        assert_equal(second.extend(tokens, all_at(model, 4)), expected)
        second.prepare(6, 17)
        assert set(held.buckets) == {8, 16, 32}
        assert set(held.buckets[16].parts) == {1, 2, 4, 8}
        assert second.lengths.tolist() == held.lengths.tolist() == [6]
        with pytest.raises(RuntimeError, match="this GraphSession is closed"):
            first.extend(tokens, all_at(model, 4))


class TestBadInput:
    @pytest.fixture
    def session(self, build: Build) -> GraphSession:
        session = GraphSession(exact(build("llama", num_hidden_layers=1), max_length=8))
        session.prefill(tokens_of(session.model, 1, 5))
        return session

    def test_widths(self, session: GraphSession) -> None:
        tokens = tokens_of(session.model, 1, 2)
        with pytest.raises(InputError, match="bit-width 7 is not stored"):
            session.extend(tokens, all_at(session.model, 7))
        with pytest.raises(InputError, match=r"width 0.*use decoder='hf'"):
            session.extend(tokens, all_at(session.model, 0))
        with pytest.raises(InputError, match=r"bit-widths are torch.int64 \[2, 3\]"):
            session.extend(tokens, widths_of(session.model, 2))
        assert session.lengths.tolist() == [5]

    def test_tokens_and_lengths(self, session: GraphSession) -> None:
        widths = all_at(session.model, 4)
        with pytest.raises(InputError, match="9 tokens do not fit into a row of 8"):
            session.extend(tokens_of(session.model, 1, 4), widths)
        with pytest.raises(InputError, match="token 83 is outside the vocabulary of 83"):
            session.extend(torch.tensor([[83]]), widths)
        with pytest.raises(InputError, match="cannot be cut to"):
            session.truncate(torch.tensor([6]))

    def test_models(self, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(InputError, match="context holds 128"):
            GraphModel(nested_model, max_length=129)
        monkeypatch.setattr("flexquant_rl.kernels.launching.triton", None)
        with pytest.raises(InputError, match="Triton is not installed"):
            GraphModel(nested_model)


class Scripted:
    """Drafts so many tokens in each round, one number after another, at widths that change with every draft."""

    uses_signals = False
    name = "scripted"

    def __init__(self, model: NestedCausalLM, verify: int, lengths: tuple[int, ...]) -> None:
        self.verify_bit_widths = all_at(model, verify)
        self._stored, self._lengths, self._round = model.bit_widths, lengths, 0

    def __call__(self, signals: Tensor | None, state: RoundState) -> Decision:
        if state.room == 0 or state.num_pending >= self._lengths[self._round % len(self._lengths)]:
            self._round += 1
            return Decision(self.verify_bit_widths[None])
        width = self._stored[(self._round + state.num_pending) % len(self._stored)]
        return Decision(torch.full_like(self.verify_bit_widths, width)[None], verify=False)


def text_of(tokens: list[GeneratedToken]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.usefixtures("quick")
class TestRounds:
    """`PolicyRunner` and its rounds run over these sessions as over any decoder's."""

    @pytest.fixture
    def model(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> NestedCausalLM:
        model = build("llama", num_hidden_layers=1)
        monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
        monkeypatch.setattr(model, "_token_text", tokenizer)
        return model

    @staticmethod
    def run(
        shared: GraphModel, policy: Policy | DraftPolicy, request: Request, ngram_drafts: int = 0
    ) -> list[GeneratedToken]:
        model = shared.model
        controller = make_controller(model, policy, make_profile(model))
        with closing(GraphSession(shared)) as session:
            return list(PolicyRunner(session, controller, ngram_drafts=ngram_drafts).generate([request]))

    @pytest.mark.parametrize(("verify", "ngram_drafts"), [(8, 0), (5, 3)])
    def test_drafted_greedy_text_is_the_plain_one(self, model: NestedCausalLM, verify: int, ngram_drafts: int) -> None:
        """The text of steps at the verify width, over three buckets."""
        shared = exact(model)
        request = Request(tokens_of(model, 5), 14)
        plain = StaticAllocation("plain", all_at(model, verify))
        expected = self.run(shared, plain, request)
        policy = Scripted(model, verify, (3, 0, 5))
        drafted = self.run(shared, policy, request, ngram_drafts)
        assert text_of(drafted) == text_of(expected)
        counts = drafted[-1].draft_counts
        assert counts is not None
        assert counts.num_draft_steps > 5
        assert len(set(text_of(expected))) > 3

    def test_drafts_at_the_verify_width_are_all_accepted(self, model: NestedCausalLM) -> None:
        """Sampled too: a verify pass has the very distributions that the drafts were drawn from."""
        shared = exact(model, mode="int8", cache_dtype=torch.float16)
        policy = drafts_at("draft:6", all_at(model, 6), all_at(model, 6), length=3)
        for temperature in (0.0, 1.5):
            request = Request(tokens_of(model, 5), 9, temperature=temperature, seed=4)
            counts = self.run(shared, policy, request)[-1].draft_counts
            assert counts is not None
            assert counts.acceptance_by_position == [1.0, 1.0, 1.0]

    def test_sampled_text_is_seeded(self, model: NestedCausalLM) -> None:
        shared = exact(model)
        policy = drafts_at("draft:3", all_at(model, 3), all_at(model, 8), length=2)

        def sampled(seed: int) -> list[int]:
            return text_of(self.run(shared, policy, Request(tokens_of(model, 4), 5, temperature=2.0, seed=seed)))

        assert sampled(1) == sampled(1)
        assert sampled(1) != sampled(2)


@pytest.mark.usefixtures("quick")
class TestEngine:
    """An engine as on a CUDA device, where it takes these sessions for a policy that drafts."""

    @pytest.fixture
    def model(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> Iterator[NestedCausalLM]:
        model = build("llama", num_hidden_layers=1, unit="layer")
        monkeypatch.setattr("flexquant_rl.engine.serving._takes_graph", lambda model, policy, name: name != "hf")
        monkeypatch.setattr(NestedCausalLM, "eos_token_ids", ())
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
        monkeypatch.setattr(model, "_token_text", tokenizer)
        return model

    def test_drafts_say_what_the_captured_loop_says(self, model: NestedCausalLM) -> None:
        plain = StaticAllocation("plain", all_at(model, 8))
        policy = drafts_at("draft:3", all_at(model, 3), all_at(model, 8), length=3)
        prompt, profile = tokens_of(model, 6), make_profile(model)
        expected = text_of(list(generate(model, plain, profile, prompt, max_new_tokens=7)))
        with closing(Engine(model, policy, profile, max_length=16)) as engine:
            assert isinstance(engine._open(1) if engine._open else None, GraphSession)
            for _ in range(2):  # the second request finds the first one's caches
                tokens = list(engine.generate(Request(prompt, 7)))
                assert text_of(tokens) == expected
                assert tokens[-1].draft_counts is not None
            (likelihood,) = engine.loglikelihood([(prompt.tolist(), expected[:3])], kl_weight=1.0)
            assert likelihood.is_greedy

    def test_the_others_stay_where_they_were(self, model: NestedCausalLM) -> None:
        policy = drafts_at("draft:3", all_at(model, 3), all_at(model, 8), length=3)
        with closing(Engine(model, policy, make_profile(model), decoder="hf")) as engine:
            assert isinstance(engine._open(1) if engine._open else None, DecodeSession)
        with pytest.raises(InputError, match="threads=2: the captured graph of a GPU has no threads"):
            Engine(model, policy, make_profile(model), num_threads=2)


def test_which_drafts_run_on_a_gpu(nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nested_model
    good = drafts_at("draft:3", all_at(model, 3), all_at(model, 8), length=3)
    assert "CUDA device" in str(why_not_graph(model, good))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert why_not_graph(model, good) is None
    for drafted, verified in ((0, 8), (3, 0)):
        policy = drafts_at("draft", all_at(model, drafted), all_at(model, verified), length=3)
        assert why_not_graph(model, policy) == "policy 'draft' reads the unquantised weights"
        with pytest.raises(InputError, match="lean decoder of the GPU cannot run this .*use decoder='hf'"):
            Engine(model, policy, make_profile(model), decoder="lean")


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute, and many of them on a busy machine
def test_every_kernel(build: Build) -> None:
    """The product interpreted too: a verify pass, padded, has the bits of single steps."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 12}
    model = build("qwen2", **sizes)
    shared = exact(model, mode="int8", cache_dtype=torch.float16)
    together, alone = GraphSession(shared), GraphSession(shared)
    for session in (together, alone):
        session.prefill(tokens_of(model, 1, 4))
    tokens, widths = tokens_of(model, 1, 3, seed=1), widths_of(model)
    assert_equal(together.extend(tokens, widths), singly(alone, tokens, widths))


@pytest.mark.gpu
class TestGraph:
    """What only a CUDA device can show."""

    @pytest.fixture
    def model(self, build: Build) -> NestedCausalLM:
        return build("qwen3")

    def test_replay_equals_launching(self, model: NestedCausalLM) -> None:
        outputs = []
        for captures in (True, False):
            session = GraphSession(exact(model, mode="int8", captures=captures))
            session.prefill(tokens_of(model, 1, 5))
            rounds = [session.extend(tokens_of(model, 1, n, seed=n), widths_of(model, seed=n)) for n in (1, 2, 5, 9)]
            session.truncate(torch.tensor([7]))
            outputs.append([*rounds, session.extend(tokens_of(model, 1, 3), all_at(model, 8))])
        for replayed, launched in zip(*outputs, strict=True):
            assert_equal(replayed, launched)

    @pytest.mark.parametrize("count", [2, 4, 7, 16])
    def test_many_tokens_have_the_bits_of_single_steps(self, model: NestedCausalLM, count: int) -> None:
        shared = exact(model, mode="int8", cache_dtype=torch.float16)
        together, alone = GraphSession(shared), GraphSession(shared)
        for session in (together, alone):
            session.prefill(tokens_of(model, 1, 5))
        tokens, widths = tokens_of(model, 1, count, seed=count), widths_of(model, seed=count)
        assert_equal(together.extend(tokens, widths), singly(alone, tokens, widths))

    def test_nothing_is_captured_twice(self, model: NestedCausalLM) -> None:
        session = GraphSession(exact(model, mode="int8", first_bucket=64))
        session.prefill(tokens_of(model, 1, 5))
        for width in (8, 3):
            session.extend(tokens_of(model, 1, 3), all_at(model, width))
            session.truncate(torch.tensor([5]))
            graphs = dict(session._open().buckets[64].graphs)
        assert list(graphs) == [4]
        session.extend(tokens_of(model, 1, 4), all_at(model, 5))
        assert session._open().buckets[64].graphs == graphs

    def test_capturing_changes_no_row(self, model: NestedCausalLM) -> None:
        """All that a request needs is captured while the row holds tokens; afterwards nothing is."""
        shared = exact(model, mode="int8")
        prepared, other = GraphSession(shared), GraphSession(shared)
        for session in (prepared, other):
            session.prefill(tokens_of(model, 1, 5))
        prepared.prepare(5, 20)
        buckets = prepared._open().buckets
        graphs = {size: dict(bucket.graphs) for size, bucket in buckets.items()}
        assert all(set(captured) == set(graph_rows.PASS_SIZES) for captured in graphs.values())
        tokens, widths = tokens_of(model, 1, 13, seed=1), widths_of(model)
        assert_equal(prepared.extend(tokens, widths), other.extend(tokens, widths))
        assert {size: bucket.graphs for size, bucket in buckets.items()} == graphs
