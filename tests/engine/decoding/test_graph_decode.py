"""The GPU's loop over tokens, launched step by step under Triton's interpreter where there is no GPU.

The product over bitplanes takes seconds per step in the interpreter and has tests of its own, so most tests put its
definition in its place; `test_every_kernel` does not. Programs are what takes the interpreter's time: models have few
heads, and sequences are no longer than what a test is about.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from defined_product import defined_product
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.controller import Controller, NativeController, TorchController
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.decision import Decision, Policy, StaticAllocation
from flexquant_rl.engine.control.policy import LearnedPolicy, PolicyCard, PrecisionNet
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.request import GeneratedToken
from flexquant_rl.engine.control.signals import SignalSchema, unit_depths
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.graph_choice import why_not_graph
from flexquant_rl.engine.decoding.graph_decode import GraphDecoder, LogReader
from flexquant_rl.engine.decoding.graph_loop import bucket_sizes
from flexquant_rl.engine.decoding.graph_widths import WidthTable
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.serving import generate
from flexquant_rl.kernels.native import supported_isas

pytest.importorskip("triton")

KL_WEIGHT = 7.0
# Between two float32 computations of the same step; the scores of widths are of order one.
NEAR_TIE = 1e-3

Build = Callable[..., NestedCausalLM]


def make_profile(model: NestedCausalLM) -> Profile:
    sensitivity = torch.rand(model.num_units, len(model.bit_widths), generator=torch.Generator().manual_seed(1))
    return Profile(roofline_cost(model), sensitivity, model.bit_widths, model.fingerprint, 10, "unquantised")


def learned(model: NestedCausalLM) -> LearnedPolicy:
    """A random network whose choices move with the signals."""
    schema = SignalSchema(model.num_units, model.bit_widths)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        net = PrecisionNet(schema)
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
        net.mean.normal_()
        net.std.uniform_(0.5, 1.5)
    return LearnedPolicy(net, PolicyCard(schema, model.fingerprint, tuple(unit.name for unit in model.units)))


def prompt_of(model: NestedCausalLM, length: int = 7) -> Tensor:
    return torch.randint(3, model.vocab_size, (length,), generator=torch.Generator().manual_seed(length))


class Recording:
    """What every step of a decoder put out."""

    def __init__(self, decoder: GraphDecoder, prompt: Tensor, count: int, **options: Any) -> None:
        loop, model = decoder.loop, decoder.model
        decoder.start(prompt, count, **({"kl_weight": KL_WEIGHT} | options))
        self.outputs: list[StepOutput] = []
        self.signals: list[Tensor] = []
        layers = torch.tensor([unit.layer_idx for unit in model.units])
        for step in range(count):
            if step:
                loop.advance(1)
            update, crest = loop.statistics[:, layers].cpu().clone().split(1)
            self.outputs.append(StepOutput(loop.logits.cpu().clone(), update, crest))
            if loop.signals is not None:
                self.signals.append(loop.signals.signals.cpu().clone())
        self.token_ids = loop.book.token_log[:count].tolist()
        self.widths = loop.book.width_log[:count].long().cpu()
        assert int(loop.book.position) == loop.held == len(prompt) + count - 1


def decoder_of(model: NestedCausalLM, policy: Policy, **options: Any) -> GraphDecoder:
    options = {"mode": "float", "cache_dtype": torch.float32, "first_bucket": 8} | options
    return GraphDecoder(model, policy, make_profile(model), **options)


def error_of(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected.cpu()).norm() / expected.cpu().norm())


def assert_follows(
    record: Recording, session: DecodeSession | LeanSession, prompt: Tensor, *, logits: float, statistics: float = 1e-3
) -> None:
    """Another decoder that reads the same tokens at the same widths puts out the same."""
    output = session.prefill(prompt[None])
    assert error_of(record.outputs[0].logits, output.logits) < logits
    for widths, token, own in zip(record.widths[1:], record.token_ids, record.outputs[1:], strict=False):
        output = session.step(torch.tensor([token]), widths)
        assert error_of(own.logits, output.logits) < logits
        if record.signals:
            for actual, expected in ((own.residual_update, output.residual_update), (own.crest, output.crest)):
                torch.testing.assert_close(actual, expected.cpu(), rtol=statistics, atol=statistics)


def assert_controlled(record: Recording, controller: Controller, policy: LearnedPolicy) -> int:
    """A controller that is told the same puts out the same signals and widths, but for ties; returns how many."""
    ties = 0
    for step, (output, token) in enumerate(zip(record.outputs, record.token_ids, strict=True)):
        tokens = torch.tensor([token])
        if step == 0:
            controller.reset(output, tokens, torch.tensor([KL_WEIGHT]))
        else:
            controller.update(output, record.widths[step][None], tokens)
        torch.testing.assert_close(record.signals[step], controller.signals(), atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]
        if step + 1 < len(record.widths):
            scores = policy.net.logits(record.signals[step])[0]
            best = scores.topk(2).values
            chosen_widths = controller.decide().bit_widths[0]
            for unit, (width, chosen) in enumerate(zip(record.widths[step + 1], chosen_widths, strict=True)):
                if width != chosen:
                    assert float(best[unit, 0] - best[unit, 1]) < NEAR_TIE
                    ties += 1
    return ties


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("family", "count"), [("llama", 11), ("mistral", 6), ("qwen2", 6), ("qwen3", 6)])
def test_equals_hugging_face(family: str, count: int, build: Build) -> None:
    """Logits, statistics and greedy tokens, a learned policy switching at every token; the longer one in 3 buckets."""
    model = build(family)
    policy, prompt = learned(model), prompt_of(model)
    decoder = decoder_of(model, policy, max_length=90)
    record = Recording(decoder, prompt, count)
    assert decoder.loop.bucket.size == (16 if count < 10 else 32)
    assert_follows(record, DecodeSession(model), prompt, logits=1e-4)
    assert record.token_ids == [int(output.logits.argmax()) for output in record.outputs]
    assert record.widths[0].tolist() == [8] * model.num_units
    assert len({tuple(widths) for widths in record.widths[1:].tolist()}) > 3
    assert assert_controlled(record, TorchController(model, policy, make_profile(model)), policy) <= 1
    assert len(set(record.token_ids)) > 2


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")
def test_equals_the_lean_decoder_of_the_cpu(build: Build) -> None:
    """With int8 activations too: both round them alike, so what is left is the order of float32 sums."""
    model, twin = build("qwen3", unit="layer"), build("qwen3", unit="layer", device="cpu")
    policy, prompt = learned(twin), prompt_of(twin)
    record = Recording(decoder_of(model, policy, max_length=60, mode="int8"), prompt, 8)
    profile = make_profile(twin)
    # The prompt is read in float32 here and in int8 there; a step inherits that through keys and values.
    assert_follows(record, LeanSession(LeanDecoder(twin)), prompt, logits=0.05, statistics=0.05)
    native = NativeController(policy, profile, twin.embedding_matrix(), unit_depths(twin), twin.unit_weights)
    assert assert_controlled(record, native, policy) <= 1


@pytest.mark.usefixtures("quick")
def test_half_precision_cache_and_int8_stay_close(build: Build) -> None:
    model = build("llama")
    prompt = prompt_of(model)
    policy = StaticAllocation("static", torch.tensor([8, 6, 8, 5, 8]))
    decoder = decoder_of(model, policy, mode="int8", cache_dtype=torch.float16)
    record = Recording(decoder, prompt, 6)
    assert_follows(record, DecodeSession(model), prompt, logits=0.05)


@pytest.mark.usefixtures("quick")
def test_an_unquantised_head(build: Build) -> None:
    model = build("llama", quantize_head=False)
    policy, prompt = learned(model), prompt_of(model)
    record = Recording(decoder_of(model, policy), prompt, 4)
    assert_follows(record, DecodeSession(model), prompt, logits=1e-4)
    assert assert_controlled(record, TorchController(model, policy, make_profile(model)), policy) == 0


@pytest.mark.usefixtures("quick")
def test_static_widths_and_a_table(build: Build) -> None:
    """A static allocation is followed, and so is whatever is written into its table later; nothing looks at signals."""
    model = build("mistral")
    prompt = prompt_of(model)
    static = StaticAllocation("static", torch.tensor([4, 3, 8, 5, 6]))
    decoder = decoder_of(model, static)
    assert decoder.loop.signals is None
    assert Recording(decoder, prompt, 3).widths[1:].tolist() == [[4, 3, 8, 5, 6]] * 2
    table = torch.tensor([[3, 3, 3, 3, 3], [8, 8, 8, 8, 8], [4, 5, 6, 4, 5]])
    switching = decoder_of(model, static)
    switching.loop.source = WidthTable(table, device=model.device)
    record = Recording(switching, prompt, 6)
    assert torch.equal(record.widths[1:], table[torch.arange(5) % 3])
    assert_follows(record, DecodeSession(model), prompt, logits=1e-4)


@pytest.mark.usefixtures("quick")
def test_a_decoder_serves_one_prompt_after_another(build: Build) -> None:
    """Nothing of the last sequence is left: neither keys, nor signals, nor counters."""
    model = build("qwen2", unit="layer")
    policy = learned(model)
    used = decoder_of(model, policy, max_length=60)
    Recording(used, prompt_of(model, 13), 3)
    again = Recording(used, prompt_of(model), 4)
    fresh = Recording(decoder_of(model, policy, max_length=60), prompt_of(model), 4)
    assert again.token_ids == fresh.token_ids
    assert torch.equal(again.widths, fresh.widths)
    assert torch.equal(again.signals[-1], fresh.signals[-1])


@pytest.mark.usefixtures("quick")
def test_batches_of_tokens(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexquant_rl.engine.decoding.graph_decode.STEPS_PER_READ", 3)
    model = build("llama", unit="layer")
    decoder = decoder_of(model, StaticAllocation("static", torch.tensor([8, 4, 8])))
    decoder.loop.source = WidthTable(torch.tensor([[3, 3, 3], [8, 8, 8], [4, 5, 6]]), device=model.device)
    record = Recording(decoder, prompt_of(model), 6)
    decoder.start(prompt_of(model), 6, kl_weight=KL_WEIGHT)
    batches = list(decoder.stream(6))
    assert [len(batch.token_ids) for batch in batches] == [1, 3, 2]
    assert [token for batch in batches for token in batch.token_ids] == record.token_ids
    assert torch.equal(torch.cat([batch.bit_widths for batch in batches]), record.widths)
    assert all(batch.step_ms > 0 for batch in batches[1:])
    assert batches[0].bit_widths.dtype == torch.int64
    ended = decoder.stream(6)
    next(ended)
    decoder.start(prompt_of(model), 6, kl_weight=KL_WEIGHT)
    with pytest.raises(RuntimeError, match="another sequence was started"):
        next(ended)


@pytest.mark.usefixtures("quick")
class TestGenerate:
    """`generate` as the command calls it, the GPU's decoder in place of the CPU's."""

    @pytest.fixture
    def model(self, build: Build, monkeypatch: pytest.MonkeyPatch) -> NestedCausalLM:
        monkeypatch.setattr("flexquant_rl.engine.serving._takes_graph", lambda model, policy, name: name != "hf")
        model = build("llama", unit="layer")
        tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids, skip_special_tokens: "")
        monkeypatch.setattr(model, "_token_text", tokenizer)
        monkeypatch.setattr(model.hf_model.generation_config, "eos_token_id", None)
        return model

    @staticmethod
    def tokens_of(model: NestedCausalLM, count: int = 5, **options: Any) -> list[GeneratedToken]:
        policy, profile = learned(model), make_profile(model)
        options = {"kl_weight": KL_WEIGHT} | options
        return list(generate(model, policy, profile, prompt_of(model), max_new_tokens=count, **options))

    def test_contract(self, model: NestedCausalLM) -> None:
        tokens = self.tokens_of(model)
        assert len(tokens) == 5
        assert tokens[0].bit_widths.tolist() == [8] * model.num_units
        assert all(token.latency_ms > 0 for token in tokens)
        reference = self.tokens_of(model, decoder="hf")
        # int8 activations and a half-precision cache: near the reference, so the same until scores are close.
        assert [token.token_id for token in tokens[:3]] == [token.token_id for token in reference[:3]]

    def test_eos_ends_the_text(self, model: NestedCausalLM) -> None:
        free = [token.token_id for token in self.tokens_of(model)]
        model.tokenizer.eos_token_id = free[3]  # type: ignore[misc]
        ended = [token.token_id for token in self.tokens_of(model)]
        assert ended == free[: free.index(free[3]) + 1]

    def test_sampling_is_seeded(self, model: NestedCausalLM) -> None:
        def sampled(seed: int) -> list[int]:
            return [token.token_id for token in self.tokens_of(model, 4, temperature=2.0, seed=seed)]

        assert sampled(1) == sampled(1)
        assert sampled(1) != sampled(2)

    def test_one_token(self, model: NestedCausalLM) -> None:
        assert len(self.tokens_of(model, 1)) == 1

    def test_a_decoder_that_is_kept(self, model: NestedCausalLM) -> None:
        policy, profile = learned(model), make_profile(model)
        graph = GraphDecoder(model, policy, profile)
        options = {"max_new_tokens": 3, "kl_weight": KL_WEIGHT, "graph": graph}
        texts = [[t.token_id for t in generate(model, policy, profile, prompt_of(model), **options)] for _ in range(2)]
        assert texts[0] == texts[1] == [token.token_id for token in self.tokens_of(model, 3)]
        with pytest.raises(ValueError, match="another model or policy"):
            next(generate(model, learned(model), profile, prompt_of(model), **options))
        with pytest.raises(InputError, match="threads=1: the captured graph of a GPU has no threads"):
            next(generate(model, policy, profile, prompt_of(model), num_threads=1, **options))

    def test_the_context_is_the_limit(self, model: NestedCausalLM) -> None:
        with pytest.raises(InputError, match="do not fit into a row of 96"):
            self.tokens_of(model, 98 - len(prompt_of(model)))
        # The last token needs no room.
        graph = decoder_of(model, learned(model), max_length=len(prompt_of(model)) + 2)
        graph.start(prompt_of(model), 3, kl_weight=KL_WEIGHT)
        assert sum(len(batch.token_ids) for batch in graph.stream(3)) == 3


class TestChoice:
    def test_a_cpu_has_no_graph(self, nested_model: NestedCausalLM) -> None:
        assert why_not_graph(nested_model, learned(nested_model)) is not None
        assert "CUDA device" in str(why_not_graph(nested_model, learned(nested_model)))

    def test_policies_of_the_host_stay_there(
        self, build: Build, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Other:
            name = "other"

            def __call__(self, signals: Tensor) -> Decision:
                return Decision(torch.full((len(signals), 3), 4))

        with pytest.raises(InputError, match="policy 'other' is neither learned nor static"):
            decoder_of(build("llama"), Other())
        monkeypatch.setattr(type(nested_model), "device", torch.device("cuda"))
        assert "policy 'other'" in str(why_not_graph(nested_model, Other()))
        unquantised = StaticAllocation("reference", torch.tensor([0, 8, 8]))
        assert "reads the unquantised weights" in str(why_not_graph(nested_model, unquantised))
        assert why_not_graph(nested_model, learned(nested_model)) is None
        stream = generate(
            nested_model,
            Other(),
            make_profile(nested_model),
            torch.tensor([5]),
            max_new_tokens=1,
            kl_weight=1.0,
            decoder="lean",
        )
        with pytest.raises(InputError, match="lean decoder of the GPU cannot run this .*use decoder='hf'"):
            next(stream)
        monkeypatch.setattr("flexquant_rl.kernels.launching.triton", None)
        assert why_not_graph(nested_model, learned(nested_model)) == "Triton is not installed"

    def test_another_device_than_the_current_one(
        self, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(nested_model), "device", torch.device("cuda:1"))
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        reason = why_not_graph(nested_model, learned(nested_model))
        assert reason == "the model is on cuda:1, but the current device is cuda:0"

    def test_models_of_other_families(self, tiny_tokenizer: Any) -> None:
        config = GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=128, n_positions=64, bos_token_id=1)
        model = nest(GPT2LMHeadModel(config).float().eval(), tiny_tokenizer, QuantizationConfig())
        with pytest.raises(InputError, match="model_type='gpt2'"):
            decoder_of(model, StaticAllocation("static", torch.tensor([4, 4, 4])))

    def test_wrong_numbers(self, build: Build) -> None:
        model = build("llama", unit="layer")
        static = StaticAllocation("static", torch.tensor([4, 4, 4]))
        with pytest.raises(InputError, match="context holds 96"):
            decoder_of(model, static, max_length=97)
        with pytest.raises(InputError, match="bit-width 7 is not stored"):
            decoder_of(model, StaticAllocation("static", torch.tensor([4, 7, 4])))
        decoder = decoder_of(model, static, max_length=20)
        with pytest.raises(InputError, match="prompt is empty"):
            decoder.start(torch.zeros(0, dtype=torch.int64), 3, kl_weight=1.0)
        with pytest.raises(InputError, match="21 tokens do not fit into a row of 20"):
            decoder.start(torch.ones(10, dtype=torch.int64), 12, kl_weight=1.0)

    def test_a_sliding_window_bounds_the_sequence(self, build: Build) -> None:
        model = build("mistral")
        static = StaticAllocation("static", torch.full((model.num_units,), 4))
        assert decoder_of(model, static).loop.weights.max_length == 90
        with pytest.raises(InputError, match="context holds 90"):
            decoder_of(model, static, max_length=91)

    def test_buckets(self) -> None:
        assert bucket_sizes(8192) == (256, 512, 1024, 2048, 4096, 8192)
        assert bucket_sizes(700) == (256, 512, 700)
        assert bucket_sizes(256) == (256,)
        assert bucket_sizes(90, first=16) == (16, 32, 64, 90)


@pytest.mark.slow
def test_every_kernel(build: Build) -> None:
    """The product interpreted too, for a step."""
    model = build("qwen2", num_hidden_layers=1)
    policy, prompt = learned(model), prompt_of(model)
    record = Recording(decoder_of(model, policy, mode="int8"), prompt, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexquant_rl.engine.decoding.graph_pass.gemv", defined_product)
        defined = Recording(decoder_of(model, policy, mode="int8"), prompt, 2)
    assert record.token_ids == defined.token_ids
    assert torch.equal(record.widths, defined.widths)
    for own, other in zip(record.outputs, defined.outputs, strict=True):
        assert error_of(own.logits, other.logits) < 1e-5


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_a_real_model(shared_dir: Path, device: torch.device) -> None:
    model = load_model(str(shared_dir / "models" / "stories260K"), QuantizationConfig()).to(device)
    policy, profile = learned(model), make_profile(model)
    prompt = model.tokenizer("Once upon a time", return_tensors="pt")["input_ids"][0]
    record = Recording(decoder_of(model, policy, max_length=64), prompt, 6)
    assert_follows(record, DecodeSession(model), prompt, logits=1e-4)
    assert record.token_ids == [int(output.logits.argmax()) for output in record.outputs]
    assert assert_controlled(record, TorchController(model, policy, profile), policy) <= 1


@pytest.fixture
def gpu_model(build: Build) -> NestedCausalLM:
    return build("qwen3")


@pytest.mark.gpu
class TestGraph:
    """What only a CUDA device can show."""

    def test_replay_equals_launching(self, gpu_model: NestedCausalLM) -> None:
        policy, prompt = learned(gpu_model), prompt_of(gpu_model)
        records = []
        for captures in (True, False):
            decoder = decoder_of(gpu_model, policy, mode="int8")
            decoder.loop.captures = captures
            records.append(Recording(decoder, prompt, 60))
        assert records[0].token_ids == records[1].token_ids
        assert torch.equal(records[0].widths, records[1].widths)
        for one, other in zip(records[0].outputs, records[1].outputs, strict=True):
            assert torch.equal(one.logits, other.logits)

    def test_no_host_synchronisation(self, gpu_model: NestedCausalLM) -> None:
        """Replays, moves to larger buckets and copies of the log included."""
        decoder = decoder_of(gpu_model, learned(gpu_model), mode="int8")
        decoder.start(prompt_of(gpu_model), 60, kl_weight=KL_WEIGHT)
        reader = LogReader(decoder.loop)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for entry in range(1, 60):
                decoder.loop.advance(1)
                reader.request(entry, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert int(decoder.loop.book.count) == 59

    def test_switching_widths_needs_no_capture(self, gpu_model: NestedCausalLM) -> None:
        static = StaticAllocation("static", torch.full((gpu_model.num_units,), 8))
        decoder = decoder_of(gpu_model, static)
        first = Recording(decoder, prompt_of(gpu_model), 10)
        graphs = [bucket.graph for bucket in decoder.loop._buckets.values()]
        source = decoder.loop.source
        assert isinstance(source, WidthTable)
        source.table.fill_(3)
        second = Recording(decoder, prompt_of(gpu_model), 10)
        assert second.widths[1:].unique().tolist() == [3]
        assert not torch.equal(first.outputs[1].logits, second.outputs[1].logits)
        assert [bucket.graph for bucket in decoder.loop._buckets.values()] == graphs
        source.table.fill_(8)
        assert Recording(decoder, prompt_of(gpu_model), 10).token_ids == first.token_ids

    def test_two_runs_are_the_same(self, gpu_model: NestedCausalLM) -> None:
        decoder = decoder_of(gpu_model, learned(gpu_model), mode="int8", cache_dtype=torch.float16)
        options = {"temperature": 1.0, "seed": 3}
        runs = [Recording(decoder, prompt_of(gpu_model), 70, **options) for _ in range(2)]
        assert runs[0].token_ids == runs[1].token_ids
        assert torch.equal(runs[0].outputs[-1].logits, runs[1].outputs[-1].logits)

    def test_nothing_is_allocated(self, gpu_model: NestedCausalLM) -> None:
        decoder = decoder_of(gpu_model, learned(gpu_model))
        decoder.start(prompt_of(gpu_model), 60, kl_weight=KL_WEIGHT)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        decoder.loop.advance(50)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_generate_takes_it(self, gpu_model: NestedCausalLM) -> None:
        assert why_not_graph(gpu_model, learned(gpu_model)) is None
        tokens = TestGenerate.tokens_of(gpu_model, 40)
        assert 1 <= len(tokens) <= 40
