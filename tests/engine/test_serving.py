"""Generation: step by step what a session gives, and the very signals that training has shown the policy."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alternating import Alternating
from torch import Tensor

from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.served_drafts import drafts_at
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.control.streamed_text import StreamedText
from flexquant_rl.engine.decoding.graph_decode import TokenBatch
from flexquant_rl.engine.decoding.options import DecoderName
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import Engine, encode, generate
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.kernels.native_decoder import LayerCache, NativeDecoder

pytestmark = pytest.mark.usefixtures("endless")

PROMPT = torch.tensor([1, 104, 101, 108, 108, 111])
WIDTHS = torch.tensor([4, 3, 6])


def end_at(monkeypatch: pytest.MonkeyPatch, *eos: int) -> None:
    """Makes these tokens end a text, and no others."""
    monkeypatch.setattr(NestedCausalLM, "eos_token_ids", eos)


def tokens_of(
    model: NestedCausalLM,
    profile: Profile,
    policy: Policy | None = None,
    *,
    count: int = 10,
    kl_weight: float = 7.0,
    temperature: float = 0.0,
    seed: int = 0,
    decoder: DecoderName = "auto",
) -> list[GeneratedToken]:
    chosen = policy or StaticAllocation("static", WIDTHS)
    return list(
        generate(
            model,
            chosen,
            profile,
            PROMPT,
            max_new_tokens=count,
            kl_weight=kl_weight,
            temperature=temperature,
            seed=seed,
            decoder=decoder,
        )
    )


def ids(tokens: list[GeneratedToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_greedy_equals_manual_stepping(nested_model: NestedCausalLM, profile: Profile) -> None:
    session = DecodeSession(nested_model)
    output = session.prefill(PROMPT[None])
    expected = []
    for _ in range(10):
        token = output.logits.argmax(-1)
        expected.append(int(token))
        output = session.step(token, WIDTHS)
    tokens = tokens_of(nested_model, profile)
    assert ids(tokens) == expected
    assert len(set(expected)) > 2


def test_widths_and_latencies(nested_model: NestedCausalLM, profile: Profile) -> None:
    class Slow:
        name = "slow"

        def __call__(self, signals: Tensor) -> Decision:
            time.sleep(0.02)
            return Decision(WIDTHS.expand(len(signals), -1))

    tokens = tokens_of(nested_model, profile, Slow(), count=4)
    assert tokens[0].bit_widths.tolist() == [8, 8, 8]  # sampled from the prefill
    assert [token.bit_widths.tolist() for token in tokens[1:]] == [WIDTHS.tolist()] * 3
    assert all(token.latency_ms > 0 for token in tokens)
    assert all(token.latency_ms >= 20 for token in tokens[1:])  # the policy's time is the step's


@pytest.mark.parametrize("end", ["abandoned", "failed", "finished"])
def test_session_is_closed_however_it_ends(
    nested_model: NestedCausalLM, profile: Profile, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    class Broken:
        name = "broken"

        def __call__(self, signals: Tensor) -> Decision:
            raise RuntimeError("no widths")

    closed: list[DecodeSession] = []
    monkeypatch.setattr(
        "flexquant_rl.engine.serving.session_opener", lambda model, **_: lambda num_rows: DecodeSession(model)
    )
    monkeypatch.setattr(DecodeSession, "close", lambda self: closed.append(self))
    policy = Broken() if end == "failed" else StaticAllocation("static", WIDTHS)
    stream = generate(nested_model, policy, profile, PROMPT, max_new_tokens=2, kl_weight=1.0, decoder="hf")
    next(stream)
    assert not closed
    if end == "abandoned":
        stream.close()  # type: ignore[attr-defined]  # an Iterator in its signature
    elif end == "failed":
        with pytest.raises(RuntimeError, match="no widths"):
            next(stream)
    else:
        list(stream)
    assert len(closed) == 1


def test_time_between_tokens_is_the_readers(nested_model: NestedCausalLM, profile: Profile) -> None:
    """A slow consumer of the stream does not make steps slow."""
    stream = generate(
        nested_model, StaticAllocation("static", WIDTHS), profile, PROMPT, max_new_tokens=3, kl_weight=1.0
    )
    latencies = []
    for token in stream:
        latencies.append(token.latency_ms)
        time.sleep(0.3)
    assert min(latencies) < 300


def test_policy_sees_what_the_environment_shows(nested_model: NestedCausalLM, profile: Profile) -> None:
    """The same prompt, dial and policy in training's environment: the same signals, widths and tokens."""
    config = EnvConfig(prompt_tokens=len(PROMPT), max_new_tokens=9, source="free")
    window = torch.zeros(1, config.window_tokens, dtype=torch.int64)
    window[0, : len(PROMPT)] = PROMPT
    session = DecodeSession(nested_model, max_length=config.window_tokens)
    episodes = Episodes(session, profile, window, config)
    in_training, zero = Alternating(), torch.tensor([0])
    episodes.controller.policy = in_training
    episodes.start(zero, zero, torch.tensor([7.0]), zero)
    widths = [episodes.step().decision.bit_widths for _ in range(9)]
    served = Alternating()
    # The lean decoder rounds activations to int8: close to training, not equal to it.
    tokens = tokens_of(nested_model, profile, served, count=10, decoder="hf")
    torch.testing.assert_close(torch.cat(served.seen), torch.cat(in_training.seen), atol=1e-5, rtol=1e-5)
    assert [token.bit_widths.tolist() for token in tokens[1:]] == torch.cat(widths).tolist()
    assert len({tuple(token.bit_widths.tolist()) for token in tokens[1:]}) == 2
    read = episodes._tokens[0, len(PROMPT) : len(PROMPT) + 10].tolist()
    assert ids(tokens) == read


def test_eos_ends_the_text(nested_model: NestedCausalLM, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ids(tokens_of(nested_model, profile))
    eos = free[4]
    first = free.index(eos)
    for configured in ((eos,), (127, eos)):
        end_at(monkeypatch, *configured)
        assert ids(tokens_of(nested_model, profile)) == free[: first + 1]


def test_sampling_is_seeded(nested_model: NestedCausalLM, profile: Profile) -> None:
    def sampled(seed: int, temperature: float = 1.5) -> list[int]:
        return ids(tokens_of(nested_model, profile, count=16, temperature=temperature, seed=seed))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(1, temperature=1e-4) == ids(tokens_of(nested_model, profile, count=16))
    state = torch.get_rng_state()
    sampled(3)
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_follows_the_distribution(nested_model: NestedCausalLM, profile: Profile) -> None:
    probs = DecodeSession(nested_model).prefill(PROMPT[None]).logits.softmax(-1)[0]
    engine = Engine(nested_model, StaticAllocation("static", WIDTHS), profile)
    requests = [Request(PROMPT, 1, temperature=1.0, seed=seed) for seed in range(300)]
    firsts = [next(engine.generate(request)).token_id for request in requests]
    top = int(probs.argmax())
    share = sum(token == top for token in firsts) / len(firsts)
    assert share == pytest.approx(float(probs[top]), abs=0.1)


def test_one_token_needs_no_policy(nested_model: NestedCausalLM, profile: Profile) -> None:
    policy = Alternating()
    assert len(tokens_of(nested_model, profile, policy, count=1)) == 1
    assert not policy.seen


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), {}, "the prompt is empty"),
        (torch.full((120,), 97), {"max_new_tokens": 10}, "do not fit into a row of 128"),
        ([1, 5, 7], {}, r"prompt_ids: a list was given; give a tensor \[T\] of int64"),
        (PROMPT[None], {}, r"prompt_ids: torch.int64 \[1, 6\] was given; give a tensor \[T\] of int64"),
        (PROMPT.float(), {}, "prompt_ids: torch.float32"),
        (torch.tensor([1, 128]), {}, "token 128 is outside the vocabulary of 128"),
        (torch.tensor([-1, 2]), {}, "token -1 is outside the vocabulary of 128"),
        (torch.full((200,), 97), {}, "do not fit into a row of 128"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (PROMPT, {"max_new_tokens": -3}, "max_new_tokens=-3"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1"),
        (PROMPT, {"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_wrong_prompts_and_numbers(
    nested_model: NestedCausalLM, profile: Profile, prompt: Tensor, changes: dict[str, float], message: str
) -> None:
    arguments = {"max_new_tokens": 5, "kl_weight": 1.0, **changes}
    stream = generate(nested_model, StaticAllocation("static", WIDTHS), profile, prompt, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        next(stream)


def test_the_context_can_be_filled(nested_model: NestedCausalLM, profile: Profile) -> None:
    prompt = torch.full((120,), 97)
    policy = StaticAllocation("static", WIDTHS)
    tokens = list(generate(nested_model, policy, profile, prompt, max_new_tokens=9, kl_weight=1.0))
    assert len(tokens) == 9  # nobody reads the last one


def requests_of(count: int) -> list[Request]:
    """Requests that differ in everything."""
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            torch.randint(97, 123, (1 + index % 7,), generator=generator),
            3 + index % 5,
            kl_weight=2.0 + index,
            temperature=(0.0, 0.9)[index % 2],
            seed=index,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize(("decoder", "count"), [("auto", 100), ("hf", 16)])
def test_four_threads_equal_one(
    nested_model: NestedCausalLM, profile: Profile, decoder: DecoderName, count: int
) -> None:
    """Threads that share an engine take turns token by token, and each gets what it would have got alone."""
    engine = Engine(nested_model, learned(nested_model), profile, decoder=decoder)
    requests = requests_of(count)

    def run(request: Request) -> tuple[list[int], list[list[int]]]:
        tokens = list(engine.generate(request))
        return ids(tokens), [token.bit_widths.tolist() for token in tokens]

    serial = [run(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, requests)) == serial
    assert len({tuple(widths) for _, steps in serial for widths in steps}) > 3, "the policy hardly switches"
    engine.close()


class TestSharedPrompts:
    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many tokens each native pass has read."""
        counts: list[int] = []
        call = NativeDecoder.__call__

        def counted(native: NativeDecoder, cache: LayerCache, token_ids: Tensor, *rest: Any, **options: Any) -> Any:
            counts.append(len(token_ids))
            return call(native, cache, token_ids, *rest, **options)

        monkeypatch.setattr(NativeDecoder, "__call__", counted)
        return counts

    def test_the_next_turn_of_a_chat_reads_what_is_new(
        self, nested_model: NestedCausalLM, profile: Profile, generator: torch.Generator, read: list[int]
    ) -> None:
        first = torch.randint(97, 123, (40,), generator=generator)
        policy = learned(nested_model)
        with closing(Engine(nested_model, policy, profile)) as engine:
            answer = ids(list(engine.generate(Request(first, 4, kl_weight=3.0))))
            turn = Request(torch.cat([first, torch.tensor(answer), torch.tensor([101, 102])]), 4, kl_weight=3.0)
            read.clear()
            found = list(engine.generate(turn))
        assert sum(read) == len(answer) + 2 + 3, "the answer, what came after it, three steps"
        with closing(Engine(nested_model, policy, profile)) as engine:
            alone = list(engine.generate(turn))
        assert ids(found) == ids(alone)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one.bit_widths, other.bit_widths)

    @pytest.mark.parametrize("end", ["abandoned", "finished"])
    def test_two_chats_keep_their_sessions(
        self, nested_model: NestedCausalLM, profile: Profile, read: list[int], end: str
    ) -> None:
        chats = [Request(torch.full((30,), token), 2) for token in (97, 98)]
        with closing(Engine(nested_model, StaticAllocation("static", WIDTHS), profile)) as engine:

            def ask(chat: Request) -> None:
                stream = engine.generate(chat)
                next(stream)
                if end == "finished":
                    list(stream)
                else:
                    stream.close()  # type: ignore[attr-defined]  # an Iterator in its signature

            for chat in chats:
                ask(chat)
            read.clear()
            for chat in chats:
                ask(chat)
        steps = len(chats) if end == "finished" else 0
        assert sum(read) == len(chats) + steps, "a prompt's last token, whose output is asked for, and a step"

    def test_threads_drafts_and_failures_with_one_beginning(
        self, nested_model: NestedCausalLM, profile: Profile, generator: torch.Generator
    ) -> None:
        """Whatever ran before or runs beside it, a request gets what it would get from an engine of its own."""

        class Broken:
            name = "broken"

            def __call__(self, signals: Tensor) -> Decision:
                raise RuntimeError("no widths")

        low, full = (torch.full((nested_model.num_units,), width) for width in (3, 8))
        drafting = drafts_at("draft", low, full, length=4, min_confidence=0.3)
        policies: list[Any] = [learned(nested_model), StaticAllocation("static", WIDTHS), drafting, Broken()]
        common = torch.randint(97, 123, (30,), generator=generator)
        jobs = []
        for index in range(48):
            kept = int(torch.randint(5, 31, (), generator=generator))
            rest = torch.randint(97, 123, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
            prompt = torch.cat([common[:kept], rest])
            jobs.append(
                (Request(prompt, 2 + index % 6, kl_weight=2.0, seed=index), policies[index % 4], index % 5 == 0)
            )

        def run(engine: Engine, job: tuple[Request, Any, bool]) -> list[tuple[int, list[int]]]:
            request, policy, is_abandoned = job
            found = []
            with suppress(RuntimeError):
                for token in engine.generate(request, policy):
                    found.append((token.token_id, token.bit_widths.tolist()))
                    if is_abandoned:
                        break
            return found

        def alone(job: tuple[Request, Any, bool]) -> list[tuple[int, list[int]]]:
            with closing(Engine(nested_model, policies[1], profile)) as engine:
                return run(engine, job)

        expected = [alone(job) for job in jobs]
        with closing(Engine(nested_model, policies[1], profile)) as engine, ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda job: run(engine, job), jobs)) == expected

    def test_an_empty_text_is_refused_after_a_request_too(self, nested_model: NestedCausalLM, profile: Profile) -> None:
        with closing(Engine(nested_model, StaticAllocation("static", WIDTHS), profile)) as engine:
            list(engine.generate(Request(PROMPT, 2)))
            nothing = torch.zeros(0, dtype=torch.int64)
            with pytest.raises(InputError, match="empty"):
                list(engine.judge_text(nothing, kl_weight=1.0))
            with pytest.raises(InputError, match="empty"):
                next(engine.generate(Request(nothing, 2)))

    def test_an_engine_that_is_dropped_is_freed(self, nested_model: NestedCausalLM, profile: Profile) -> None:
        engine = Engine(nested_model, StaticAllocation("static", WIDTHS), profile)
        list(engine.generate(Request(PROMPT, 2)))
        held = weakref.ref(engine)
        gc.disable()
        try:
            del engine
            assert held() is None, "no cycle keeps it"
        finally:
            gc.enable()

    def test_contexts_that_begin_alike_are_read_once(
        self, nested_model: NestedCausalLM, profile: Profile, read: list[int]
    ) -> None:
        examples = [97] * 30
        pairs = [((*examples, 98), [101, 102]), ([*examples, 99], [101, 102])]
        with closing(Engine(nested_model, StaticAllocation("static", WIDTHS), profile)) as engine:
            engine.loglikelihood(pairs, kl_weight=1.0)
            assert sum(read) == 31 + 1 + 1 + 1, "a context, a token of its text, the next one's last token, its text's"


def test_likelihoods_wait_for_their_turn(nested_model: NestedCausalLM, profile: Profile) -> None:
    engine = Engine(nested_model, learned(nested_model), profile)
    pairs = [([1, 104], [101, 108, 108]), ([1], [111]), ([1, 50, 60, 70], [80, 90])]
    alone = engine.loglikelihood(pairs, kl_weight=3.0, num_rows=2)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: engine.loglikelihood(pairs, kl_weight=3.0, num_rows=2), range(8)):
            assert found == alone
    engine.close()


def test_closing_ends_what_runs_and_refuses_the_rest(nested_model: NestedCausalLM, profile: Profile) -> None:
    engine = Engine(nested_model, StaticAllocation("static", WIDTHS), profile)
    stream = engine.generate(Request(PROMPT, 50))
    next(stream)
    engine.close()
    engine.close()
    rest = list(stream)
    assert [token.finish_reason for token in rest] == ["cancelled"]
    with pytest.raises(RuntimeError, match="Engine is closed"):
        next(engine.generate(Request(PROMPT, 5)))
    with pytest.raises(RuntimeError, match="Engine is closed"):
        engine.loglikelihood([([1], [2])], kl_weight=1.0)


def test_one_request_in_two_threads_is_cancelled_twice_and_stays_the_callers(
    nested_model: NestedCausalLM, profile: Profile
) -> None:
    engine = Engine(nested_model, StaticAllocation("static", WIDTHS), profile)
    request = Request(PROMPT, 50)
    first, second = engine.generate(request), engine.generate(request)
    next(first), next(second)
    first.close()  # type: ignore[attr-defined]  # an Iterator in its signature
    engine.close()
    assert [token.finish_reason for token in second] == ["cancelled"]
    assert not request.cancel.is_set()
    later = Engine(nested_model, StaticAllocation("static", WIDTHS), profile)
    assert len(list(later.generate(request))) == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight=-1 must be positive and finite"),
        ({"kl_weight": float("nan")}, "kl_weight=nan must be positive and finite"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"pairs": [([1], [5]), ([1], [5, 6]), ([1], [])]}, "a context or continuation is empty"),
        ({"pairs": [([1], [5]), ([1], [500])]}, "token 500 is outside the vocabulary of 128"),
        ({"pairs": [([1], [5]), ([1] * 100, [5] * 30)]}, "100 and 30 tokens do not fit into a row of 128"),
    ],
)
def test_wrong_likelihoods_are_refused_before_anything_runs(
    nested_model: NestedCausalLM, profile: Profile, changes: dict[str, Any], message: str
) -> None:
    policy = Alternating()
    engine = Engine(nested_model, policy, profile)
    arguments = {"pairs": [([1], [5, 6])], "kl_weight": 1.0, "num_rows": 1} | changes
    with pytest.raises(InputError, match=message):
        engine.loglikelihood(**arguments)
    assert not policy.seen
    assert engine.loglikelihood([], kl_weight=1.0) == []


def test_closing_ends_likelihoods(nested_model: NestedCausalLM, profile: Profile) -> None:
    class Closing(Alternating):
        def __call__(self, signals: Tensor) -> Decision:
            closing.start()
            return super().__call__(signals)

    policy = Closing()
    engine = Engine(nested_model, policy, profile)
    closing = threading.Thread(target=engine.close)
    with pytest.raises(RuntimeError, match="Engine is closed"):
        engine.loglikelihood([([1], [5] * 20)], kl_weight=1.0)
    assert len(policy.seen) == 1
    closing.join()


class FakeGraph:
    """A captured graph that counts; its sequences have no end of their own."""

    def __init__(self, model: NestedCausalLM, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.loop = SimpleNamespace(weights=SimpleNamespace(max_length=64), prepare=lambda first, last: None)

    def start(self, prompt_ids: Tensor, max_new_tokens: int, **options: float) -> None:
        self.first = int(prompt_ids[0])

    def stream(self, max_new_tokens: int) -> Iterator[TokenBatch]:
        for index in range(max_new_tokens):
            yield TokenBatch([self.first + index], WIDTHS[None], 1.0)


class TestTurnsOfAGraph:
    @pytest.fixture
    def engine(self, nested_model: NestedCausalLM, profile: Profile) -> Engine:
        policy = StaticAllocation("static", WIDTHS)
        graph: Any = FakeGraph(nested_model, policy)
        return Engine(nested_model, policy, profile, graph=graph)

    @staticmethod
    def paused(engine: Engine) -> Iterator[GeneratedToken]:
        stream = engine.generate(Request(torch.tensor([40]), 9))
        assert next(stream).token_id == 40
        return stream

    def test_the_second_waits_for_the_first(self, engine: Engine) -> None:
        stream = self.paused(engine)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: ids(list(engine.generate(Request(torch.tensor([60]), 3)))))
            assert ids(list(stream)) == list(range(41, 49))
            assert waiting.result(timeout=20) == [60, 61, 62]

    def test_closing_frees_who_waits(self, engine: Engine) -> None:
        stream = self.paused(engine)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: list(engine.generate(Request(torch.tensor([60]), 3))))
            time.sleep(0.1)
            engine.close()
            with pytest.raises(RuntimeError, match="Engine is closed"):
                waiting.result(timeout=20)
        assert [token.finish_reason for token in stream] == ["cancelled"]

    def test_who_waits_may_be_cancelled(self, engine: Engine) -> None:
        stream, request = self.paused(engine), Request(torch.tensor([60]), 3)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: list(engine.generate(request)))
            request.cancel.set()
            assert waiting.result(timeout=20) == []
        assert len(list(stream)) == 8

    def test_a_thread_does_not_wait_for_itself(self, engine: Engine) -> None:
        stream = self.paused(engine)
        with pytest.raises(RuntimeError, match="this thread reads another request of the captured graph"):
            next(engine.generate(Request(torch.tensor([60]), 3)))
        assert len(list(stream)) == 8
        assert len(list(engine.generate(Request(torch.tensor([60]), 3)))) == 3


def test_a_prompt_may_be_text(nested_model: NestedCausalLM, profile: Profile) -> None:
    policy = StaticAllocation("static", WIDTHS)
    from_text = list(generate(nested_model, policy, profile, "hello", max_new_tokens=6))
    from_ids = list(generate(nested_model, policy, profile, encode(nested_model, "hello"), max_new_tokens=6))
    assert ids(from_text) == ids(from_ids)
    assert "".join(token.text for token in from_text) == nested_model.tokenizer.decode(ids(from_text))


def learned(model: NestedCausalLM) -> LearnedPolicy:
    """A random network, sharp enough that it switches."""
    schema = SignalSchema(model.num_units, model.bit_widths)
    net = PrecisionNet(schema)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return LearnedPolicy(net, PolicyCard(schema, model.fingerprint, tuple(unit.name for unit in model.units)))


class ByteTokenizer:
    """Tokens are bytes of UTF-8, so that characters are spread over tokens; 0 is special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in token_ids if token).decode("utf-8", errors="replace")


def test_streamed_text_waits_for_whole_characters() -> None:
    text = "a\N{GREEK SMALL LETTER BETA} \N{GRINNING FACE}!"
    stream = StreamedText(ByteTokenizer(), list(b"prompt"))  # type: ignore[arg-type]
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert pieces == ["a", "", "\N{GREEK SMALL LETTER BETA}", " ", "", "", "", "\N{GRINNING FACE}", "!"]
    assert stream.add(0) == ""
    long = "the quick brown fox " * 5
    assert "".join(stream.add(byte) for byte in long.encode()) == long
