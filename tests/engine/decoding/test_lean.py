"""The lean decoder gives the numbers of the Hugging Face model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.decoding.choice import default_decoder, open_session
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.lean import LeanDecoder, LeanSession, why_not_lean
from flexquant_rl.engine.decoding.llama_parts import why_other_numbers
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.embedded import embedded_model_path
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.nesting import nest
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.engine.quantisation.perplexity import perplexity
from flexquant_rl.fq_env.prompts import load_windows, spread
from flexquant_rl.kernels.native import supported_isas
from flexquant_rl.kernels.native_decoder import LayerCache, NativeDecoder

pytestmark = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")

LOGITS_TOLERANCE = 1e-4  # relative, the bar of the design
REAL_MODELS = ("stories260K", "babyllama-361", "multi-7m")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALED_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
HALF_WINDOWED = {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 80}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2Config, Qwen2ForCausalLM, {**HALF_WINDOWED}),
    "qwen3-window": (Qwen3Config, Qwen3ForCausalLM, {**HALF_WINDOWED, "attention_bias": True}),
    "unknown-fields": (LlamaConfig, LlamaForCausalLM, {"final_logit_softcapping": 2.0, "logits_scaling": 3.0}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 40}),
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A random three-layer model with norms and biases that are not trivial."""
    config_class, model_class, options = FAMILIES[family]
    shape = {
        "vocab_size": 211,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    }
    return random_model(model_class, config_class(**(shape | options | changes)), seed=7)


def nested(family: str, tokenizer: Any, *, quantize_head: bool = True, **changes: Any) -> NestedCausalLM:
    config = QuantizationConfig(group_size=32, unit="half", quantize_head=quantize_head)
    return nest(build(family, **changes), tokenizer, config)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def assert_close(lean: StepOutput, reference: StepOutput) -> None:
    assert relative_error(lean.logits, reference.logits) < LOGITS_TOLERANCE
    torch.testing.assert_close(lean.residual_update, reference.residual_update, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lean.crest, reference.crest, rtol=1e-3, atol=1e-4)


def random_widths(model: NestedCausalLM, generator: torch.Generator) -> Tensor:
    allowed = torch.tensor([0, *model.bit_widths])
    return allowed[torch.randint(len(allowed), (model.num_units,), generator=generator)]


def compare(model: NestedCausalLM, generator: torch.Generator, *, prompt: int = 37, steps: int = 12) -> None:
    """Prefill and steps at random widths, some of them unquantised."""
    lean = LeanSession(LeanDecoder(model, mode="float32"))
    reference = DecodeSession(model)
    ids = torch.randint(3, model.vocab_size, (1, prompt), generator=generator)
    widths = random_widths(model, generator)
    assert_close(lean.prefill(ids, bit_widths=widths), reference.prefill(ids, bit_widths=widths))
    for _ in range(steps):
        widths = random_widths(model, generator)
        token = torch.randint(3, model.vocab_size, (1,), generator=generator)
        assert_close(lean.step(token, widths), reference.step(token, widths))
    assert torch.equal(lean.lengths, reference.lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face(family: str, tiny_tokenizer: Any, generator: torch.Generator) -> None:
    compare(nested(family, tiny_tokenizer), generator)


def test_equals_hugging_face_with_an_unquantised_head(tiny_tokenizer: Any, generator: torch.Generator) -> None:
    compare(nested("llama", tiny_tokenizer, quantize_head=False), generator)


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-window", "qwen3-window"])
def test_no_session_is_longer_than_a_window(family: str, tiny_tokenizer: Any) -> None:
    model = nested(family, tiny_tokenizer)
    window = model.hf_model.config.sliding_window
    assert LeanDecoder(model).max_length == window < 128
    with pytest.raises(InputError, match=f"context holds {window}"):
        LeanDecoder(model, max_length=window + 1)


@pytest.mark.parametrize("name", REAL_MODELS)
class TestRealModels:
    @pytest.fixture
    def model(self, shared_dir: Path, name: str) -> NestedCausalLM:
        return load_model(str(shared_dir / "models" / name), QuantizationConfig())

    def test_logits(self, model: NestedCausalLM, generator: torch.Generator) -> None:
        compare(model, generator)

    def test_greedy_tokens_at_8_bits(self, model: NestedCausalLM, generator: torch.Generator) -> None:
        count = min(200, model.max_context - 4)
        widths = torch.full((model.num_units,), 8)
        prompt = torch.randint(3, model.vocab_size, (1, 4), generator=generator)
        lean, reference = LeanSession(LeanDecoder(model, mode="float32")), DecodeSession(model)
        assert greedy(lean, prompt, widths, count) == greedy(reference, prompt, widths, count)


def greedy(session: LeanSession | DecodeSession, prompt: Tensor, widths: Tensor, count: int) -> list[int]:
    token = session.prefill(prompt, bit_widths=widths).logits.argmax(-1)
    tokens = [int(token)]
    for _ in range(count - 1):
        token = session.step(token, widths).logits.argmax(-1)
        tokens.append(int(token))
    return tokens


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where two threads are allowed; torch has one again afterwards."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def decoder(nested_model: NestedCausalLM) -> LeanDecoder:
    return LeanDecoder(nested_model, max_length=40)


class TestSession:
    def test_fork_leaves_the_parent_untouched(self, decoder: LeanDecoder) -> None:
        session = LeanSession(decoder)
        widths, token = torch.tensor([3, 8, 4]), torch.tensor([9])
        session.prefill(torch.arange(5, 25)[None])
        twin, other = session.fork(), session.fork()
        other.step(torch.tensor([50]), torch.tensor([8, 3, 3]))
        assert torch.equal(session.step(token, widths).logits, twin.step(token, widths[None]).logits)
        assert session.lengths.tolist() == [21]

    def test_prefill_restarts(self, decoder: LeanDecoder) -> None:
        session = LeanSession(decoder)
        first = session.prefill(torch.arange(5, 15)[None])
        session.step(torch.tensor([9]), torch.tensor([3, 3, 3]))
        again = session.prefill(torch.arange(5, 15)[None], rows=torch.tensor([0]))
        assert torch.equal(first.logits, again.logits)

    def test_what_a_row_has_read_is_not_read_again(self, decoder: LeanDecoder, generator: torch.Generator) -> None:
        """Whatever came between, a prompt that begins like the last one gives the bits of a fresh session."""
        held, stored = LeanSession(decoder), torch.tensor(decoder.model.bit_widths)
        prompt, widths, shared_before = torch.randint(5, 100, (30,), generator=generator), None, 0
        for _ in range(40):
            kept = int(torch.randint(0, len(prompt) + 1, (), generator=generator))
            rest = torch.randint(5, 100, (1 + (kept * 7) % (35 - kept),), generator=generator)
            prompt = torch.cat([prompt[:kept], rest])
            if torch.rand((), generator=generator) < 0.2:
                widths = stored[torch.randint(0, len(stored), (3,), generator=generator)]
            shared_before += held.num_shared(prompt)
            fresh = LeanSession(decoder)
            outputs = [session.prefill(prompt[None], bit_widths=widths) for session in (held, fresh)]
            read_at = stored[torch.randint(0, len(stored), (3,), generator=generator)]
            following = torch.randint(5, 100, (1, 3), generator=generator)
            outputs += [session.extend(following, read_at).at(-1) for session in (held, fresh)]
            for one, other in (outputs[:2], outputs[2:]):
                assert torch.equal(one.logits, other.logits)
                assert torch.equal(one.residual_update, other.residual_update)
                assert torch.equal(one.crest, other.crest)
            cut = torch.randint(0, len(prompt) + 3, (1,), generator=generator)
            held.truncate(cut)
            if cut < 36:
                held.extend(following, read_at)  # other keys and values where the prompt's were
        assert shared_before, "nothing was shared"

    def test_score_is_the_parallel_pass(self, decoder: LeanDecoder) -> None:
        ids = torch.arange(5, 25)[None]
        expected = DecodeSession(decoder.model).score(ids, first=3)
        assert torch.equal(LeanSession(decoder).score(ids, first=3), expected)

    def test_refusals(self, decoder: LeanDecoder) -> None:
        session = LeanSession(decoder)
        widths, token = torch.tensor([4, 4, 4]), torch.tensor([9])
        with pytest.raises(InputError, match="prompt is empty"):
            session.prefill(torch.zeros(1, 0, dtype=torch.int64))
        with pytest.raises(InputError, match="41 tokens do not fit into a row of 40"):
            session.prefill(torch.ones(1, 41, dtype=torch.int64))
        session.prefill(torch.ones(1, 40, dtype=torch.int64))
        with pytest.raises(InputError, match="41 tokens do not fit"):
            session.step(token, widths)
        session.prefill(torch.ones(1, 3, dtype=torch.int64))
        with pytest.raises(InputError, match="bit-width 7 is not stored"):
            session.step(token, torch.tensor([4, 7, 4]))
        with pytest.raises(InputError, match="2 bit-widths were given"):
            session.step(token, torch.tensor([4, 4]))
        assert session.lengths.tolist() == [3]
        with pytest.raises(ValueError, match="2 sequences were given for 1 rows"):
            session.prefill(torch.ones(2, 3, dtype=torch.int64))
        session.close()
        session.close()
        with pytest.raises(RuntimeError, match="closed"):
            session.step(token, widths)

    def test_half_a_prompt_leaves_an_empty_row(self, decoder: LeanDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        session = LeanSession(decoder)
        session.prefill(torch.ones(1, 3, dtype=torch.int64), bit_widths=torch.tensor([[4, 4, 4]]))
        call = NativeDecoder.__call__

        def failing(
            native: NativeDecoder, cache: LayerCache, token_ids: Tensor, position: int, *rest: Tensor
        ) -> object:
            if position:
                raise RuntimeError("out of luck")
            return call(native, cache, token_ids, position, *rest)

        monkeypatch.setattr(NativeDecoder, "__call__", lambda *arguments, num_logits: failing(*arguments))
        with pytest.raises(RuntimeError, match="out of luck"):
            session.prefill(torch.ones(1, 20, dtype=torch.int64))
        monkeypatch.undo()
        assert session.lengths.tolist() == [0]

    def test_no_unquantised_weights(self, tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
        model = nest(tiny_llama, tiny_tokenizer, QuantizationConfig(), keep_reference=False)
        session = LeanSession(LeanDecoder(model))
        session.prefill(torch.ones(1, 3, dtype=torch.int64))
        with pytest.raises(InputError, match="holds nested weights only"):
            session.step(torch.tensor([1]), torch.tensor([4, 0, 4]))

    def test_context_is_the_limit(self, nested_model: NestedCausalLM) -> None:
        with pytest.raises(InputError, match="context holds 128"):
            LeanDecoder(nested_model, max_length=129)


class TestChoice:
    def test_llama_is_lean(self, nested_model: NestedCausalLM) -> None:
        assert default_decoder(nested_model) == ("lean", 1)
        assert isinstance(open_session(nested_model), LeanSession)
        assert isinstance(open_session(nested_model, decoder="hf"), DecodeSession)

    def test_other_models_are_not(self, tiny_tokenizer: Any) -> None:
        config = GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=128, n_positions=64, bos_token_id=1)
        model = nest(GPT2LMHeadModel(config).float().eval(), tiny_tokenizer, QuantizationConfig())
        assert "model_type='gpt2'" in str(why_not_lean(model))
        assert isinstance(open_session(model), DecodeSession)
        with pytest.raises(InputError, match="use decoder='hf'"):
            open_session(model, decoder="lean")

    @pytest.mark.parametrize(
        ("family", "changes", "reason"),
        [
            ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
            ("llama", {"rope_parameters": {**SCALED_ROPE, "rope_type": "dynamic"}}, "rope_type='dynamic'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_it_cannot_do(self, family: str, changes: dict[str, Any], reason: str, tiny_tokenizer: Any) -> None:
        model = nested(family, tiny_tokenizer, num_hidden_layers=2, **changes)
        assert reason in str(why_not_lean(model))
        assert default_decoder(model)[0] == "hf"
        assert isinstance(open_session(model), DecodeSession), "auto takes the other decoder and does not fail"
        with pytest.raises(InputError, match=f"cannot run this model .*{reason}.*; use decoder='hf'"):
            open_session(model, decoder="lean")

    @pytest.mark.parametrize(
        ("family", "changes", "reason"),
        [
            ("llama", {"rope_parameters": {**SCALED_ROPE, "partial_rotary_factor": 0.5}}, "rotates 8 of 16 dimensions"),
            (
                "qwen2",
                {"layer_types": ["full_attention", "chunked_attention"]},
                "layer_types holds 'chunked_attention'",
            ),
            ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types holds 'sliding_attention' without"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_this_transformers_cannot_do_either(self, family: str, changes: dict[str, Any], reason: str) -> None:
        assert reason in str(why_other_numbers(build(family, num_hidden_layers=2, **changes)))

    def test_a_class_of_ones_own(self, tiny_tokenizer: Any) -> None:
        class Louder(LlamaForCausalLM):
            """Its configuration says llama, and its logits are others."""

        model = nest(Louder(build("llama").config).eval(), tiny_tokenizer, QuantizationConfig())
        assert why_not_lean(model) == "Louder is not the llama of transformers itself"

    def test_a_layer_that_differs(self, tiny_tokenizer: Any) -> None:
        model: Any = nested("llama", tiny_tokenizer)
        attention = model.hf_model.model.layers[1].self_attn
        attention.scaling *= 2
        assert why_not_lean(model) == "its layers scale attention differently"
        attention.scaling /= 2
        attention.q_proj = torch.nn.Sequential(attention.q_proj)
        assert why_not_lean(model) == "layers.1.self_attn.q_proj is a Sequential, not a plain linear"

    @pytest.mark.parametrize("decoder", ["lean", "hf"])
    def test_threads_change_no_logits(self, decoder: Any, nested_model: NestedCausalLM, two_processors: None) -> None:
        widths, outputs = torch.tensor([3, 8, 4]), []
        for num_threads in (1, 2):
            session = open_session(nested_model, max_length=40, decoder=decoder, num_threads=num_threads)
            prompt = session.prefill(torch.arange(5, 25)[None], bit_widths=widths)
            outputs.append((prompt.logits, session.step(torch.tensor([9]), widths).logits))
            if isinstance(session, DecodeSession):
                assert torch.get_num_threads() == num_threads, "torch's number is the process's"
        for one, two in zip(*outputs, strict=True):
            if decoder == "lean":
                assert torch.equal(one, two)
            else:
                torch.testing.assert_close(one, two)

    def test_threads_of_the_default_decoder(
        self, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert default_decoder(nested_model, 2) == ("lean", 2)
        monkeypatch.setattr("flexquant_rl.engine.decoding.lean.load_library", lambda: None)
        assert default_decoder(nested_model, 2) == ("hf", 2)

    @pytest.mark.parametrize("num_threads", [0, -1, 100_000])
    def test_threads_without_a_processor(self, num_threads: int, nested_model: NestedCausalLM) -> None:
        with pytest.raises(
            InputError, match=rf"threads={num_threads} must be within 1\.\.\d+, .*; give e.g. --threads 1"
        ):
            open_session(nested_model, num_threads=num_threads)

    def test_a_body_that_does_not_exist(self, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FQ_CPU_ISA", "sse")
        with pytest.raises(InputError, match="FQ_CPU_ISA=sse but this machine runs"):
            open_session(nested_model)

    def test_without_a_library(self, nested_model: NestedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flexquant_rl.engine.decoding.lean.load_library", lambda: None)
        assert default_decoder(nested_model) == ("hf", torch.get_num_threads())
        assert isinstance(open_session(nested_model), DecodeSession)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REAL_MODELS, "embedded"])
def test_int8_activations_cost_little_perplexity(name: str, shared_dir: Path) -> None:
    """At most 0.5% at every width, or int8 may not be the default."""
    path = embedded_model_path() if name == "embedded" else shared_dir / "models" / name
    model = load_model(str(path), QuantizationConfig())
    texts = [] if name == "embedded" else [shared_dir / "text" / "tinystories_valid_head.txt"]
    length = min(128, model.max_context)
    windows = spread(load_windows(model.tokenizer, length, texts).test, 8)
    lean = LeanSession(LeanDecoder(model, max_length=length))
    exact = DecodeSession(model)
    for bit_width in model.bit_widths:
        widths = torch.full((model.num_units,), bit_width)
        rounded = lean_perplexity(lean, windows, widths)
        reference = perplexity(exact, windows, widths)
        print(f"{name} {bit_width}: {reference:.4f} -> {rounded:.4f} ({rounded / reference - 1:+.3%})")
        assert rounded < 1.005 * reference


def lean_perplexity(session: LeanSession, windows: Tensor, widths: Tensor) -> float:
    """Perplexity of token-by-token decoding, the first token of a window being context only."""
    nll = []
    for window in windows:
        output = session.prefill(window[None, :1], bit_widths=widths)
        for token in window[1:]:
            nll.append(-output.logits[0].log_softmax(-1)[token])
            output = session.step(token[None], widths)
    return float(torch.stack(nll).mean().exp())
