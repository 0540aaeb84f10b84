"""Every benchmark of `fq bench` runs on a tiny size. No time is asserted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flexquant_rl.engine.benches import gemv as bench_gemv
from flexquant_rl.engine.benches import llama_cpp as bench_llama_cpp
from flexquant_rl.engine.benches.decode import bench_decode, random_llama
from flexquant_rl.engine.benches.gptq import bench_gptq
from flexquant_rl.engine.benches.harness import READ, BenchRefusedError, table
from flexquant_rl.engine.benches.llama_cpp import GGUF_BITS, LlamaCppSession, has_llama_cpp, write_gguf
from flexquant_rl.engine.benches.options import BenchConfig, DecodeBench, GemvBench, GptqBench, PolicyBench, VerifyBench
from flexquant_rl.engine.benches.policy import bench_policy
from flexquant_rl.engine.benches.verify import add_steps, bench_verify
from flexquant_rl.engine.checkpoint import load_model, save_checkpoint
from flexquant_rl.engine.decoding.lean import LeanSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.kernels.native import supported_isas

needs_library = pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")
TINY_LLAMA = DecodeBench(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    ffn_size=96,
    vocab=50,
    prompt_tokens=5,
    new_tokens=4,
    bit_widths=(4,),
    rounds=1,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Benchmarks set the number of torch's threads; the tests run with one anyway."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("config", [GemvBench, DecodeBench, VerifyBench, PolicyBench], ids=lambda config: config.name)
def test_test_files_exist(config: type[BenchConfig], repo_root: Path) -> None:
    assert config.tests
    assert all((repo_root / name).is_file() for name in config.tests)


@needs_library
class TestGemv:
    CONFIG = GemvBench(shape=(128, 128), bit_widths=(3, 8), ring_mb=1, rounds=1)

    def test_rows(self) -> None:
        found = bench_gemv.bench_gemv(self.CONFIG)
        peers = {"torch_fp32", "torch_bf16", "aten_int8pack_bf16", "aten_int4pack_g128_bf16"}
        assert {row["provider"] for row in found} == {READ, "native", *peers}
        ours = [row for row in found if row["provider"] == "native"]
        assert [row["bit_width"] for row in ours] == [3, 8]
        assert [row["bytes"] for row in ours] == [128 * 128 * b // 8 + 128 * 4 for b in (3, 8)]
        assert all(row["times_faster_than"].keys() == peers for row in ours)
        assert all(row["shape"] == [1, 128, 128] and row["clock"] == "thread_cpu" for row in found)

    def test_a_wrong_product_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = bench_gemv.bitplane_gemv
        monkeypatch.setattr(bench_gemv, "bitplane_gemv", lambda *args, **kwargs: 1.05 * right(*args, **kwargs))
        with pytest.raises(BenchRefusedError, match="at 3 bits is wrong"):
            bench_gemv.bench_gemv(self.CONFIG)


@pytest.mark.skipif(not supported_isas(), reason="no C++ compiler here, so no native kernels")
def test_gptq_rows() -> None:
    found = bench_gptq(GptqBench(num_outputs=19, group_size=32, rounds=1))
    assert [row["provider"] for row in found] == [
        "native_feed_back",
        "torch_feed_back",
        "native_descend",
        "torch_descend",
    ]
    assert all(row["p50_us"] > 0 for row in found)


def test_policy_rows() -> None:
    found = bench_policy(PolicyBench(units=3, vocab=11, rounds=1))
    served = ["native_policy", "native_signals_and_policy"] if supported_isas() else []
    sure = ["native_confidence"] if supported_isas() else []
    names = [*served, *sure, "policy", "signals", "signals_and_policy", "confidence"]
    assert [row["provider"] for row in found] == names
    assert all(row["p50_us"] > 0 and row["units"] == 3 and "bytes" not in row for row in found)


@needs_library
def test_decode_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexquant_rl.engine.benches.decode.has_llama_cpp", lambda: False)
    lines: list[str] = []
    found = {row["provider"]: row for row in bench_decode(TINY_LLAMA, progress=lines.append)}
    assert found.keys() == {READ, "lean", "hf_generate_fp32", "hf_generate_bf16"}
    assert found["lean"]["num_samples"] == 4
    assert found["hf_generate_fp32"]["num_samples"] == 3, "the first token comes from the prompt's pass"
    num_weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 50 * 64
    assert found["hf_generate_fp32"]["bytes"] == 2 * found["hf_generate_bf16"]["bytes"] == 4 * num_weights
    assert any("flexquant-rl[bench]" in line for line in lines)


@needs_library
def test_decode_rows_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexquant_rl.engine.benches.decode.has_llama_cpp", lambda: False)
    found = bench_decode(replace(TINY_LLAMA, threads=(1, 2)))
    providers = (READ, "lean", "hf_generate_fp32", "hf_generate_bf16")
    assert [(row["num_threads"], row["provider"]) for row in found] == [(n, name) for n in (1, 2) for name in providers]
    assert {row["clock"] for row in found} == {"wall"}, "one clock for all, and a thread's own leaves out the others"
    for row in found[1::4]:
        own = {peer["provider"]: peer["p50_us"] for peer in found if peer["num_threads"] == row["num_threads"]}
        ratios = {name: round(own[name] / row["p50_us"], 2) for name in providers[2:]}
        assert row["times_faster_than"] == ratios, "against peers with as many threads"
    assert table(found).splitlines()[0].split()[:2] == ["provider", "num_threads"]
    assert "num_threads" not in table(found[:4])


@pytest.mark.parametrize(
    ("threads", "message"),
    [((), "one or more different numbers"), ((1, 1), "one or more different numbers"), ((1, 0), "threads=0 must be")],
    ids=str,
)
def test_decode_threads_that_make_no_rows(threads: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"{message}.*--threads 1"):
        replace(TINY_LLAMA, threads=threads).validate()


def test_a_reference_of_a_random_model() -> None:
    with pytest.raises(InputError, match="reference=original is what a nested checkpoint was made from, .* --model"):
        VerifyBench(reference="original").validate()


@needs_library
class TestVerify:
    CONFIG = VerifyBench(
        **{
            name: getattr(TINY_LLAMA, name)
            for name in ("hidden_size", "num_layers", "num_heads", "ffn_size", "vocab", "prompt_tokens", "rounds")
        },
        num_tokens=(3, 1, 16),
        bit_widths=(4, 8),
        threads=(1, 2),
        peers=False,
        new_tokens=2,
    )

    def test_rows(self) -> None:
        self.CONFIG.validate()
        found = bench_verify(self.CONFIG)
        kinds = [(row["num_threads"], row["bit_width"], row["num_tokens"]) for row in found]
        assert kinds == [(threads, width, count) for threads in (1, 2) for width in (4, 8) for count in (3, 1, 16)]
        assert all(row["num_samples"] == 2 and row["op"] == "verify" for row in found)
        assert all(row["steps"] == 1 for row in found if row["num_tokens"] == 1)
        assert "steps" in table(found).splitlines()[0].split()

    def test_steps_are_of_the_same_provider_width_and_threads(self) -> None:
        found = [
            {"provider": name, "num_threads": threads, "bit_width": width, "num_tokens": count, "p50_us": p50_us}
            for name, threads, width, count, p50_us in (
                *[("a", 1, 8, 2, 6.0), ("a", 1, 8, 1, 4.0), ("a", 1, 6, 1, 3.0), ("a", 2, 8, 1, 2.0)],
                *[("a", 1, 6, 4, 4.5), ("a", 2, 8, 4, 8.0), ("b", 1, 8, 1, 12.0), ("b", 1, 8, 4, 6.0)],
            )
        ]
        add_steps(found)
        assert [row["steps"] for row in found] == [1.5, 1, 1, 1, 1.5, 4, 1, 0.5]

    def test_llama_cpp_takes_the_model_that_a_checkpoint_was_made_from(
        self, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        said: list[str] = []
        plain, nested = str(tmp_path / "plain"), str(tmp_path / "nested")
        random_llama(replace(self.CONFIG, vocab=128)).save_pretrained(plain)
        tiny_tokenizer.save_pretrained(plain)
        save_checkpoint(load_model(plain, QuantizationConfig()), Path(nested))
        config = replace(self.CONFIG, model=nested, peers=True, threads=(1,), bit_widths=(8,), num_tokens=(1, 2))
        bench_verify(config, progress=said.append)
        wanted = "name the model that the checkpoint was made from with --reference"
        assert (wanted if has_llama_cpp() else "it is not installed") in said[-1]
        if not has_llama_cpp():
            pytest.skip("the extra `bench` is not installed")
        found = bench_verify(replace(config, reference=plain), progress=said.append)
        assert [row["num_tokens"] for row in found if row["provider"] == "llama_cpp_q8_0"] == [1, 2]

    def test_a_pass_with_other_logits_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = LeanSession.extend

        def wrong(session: LeanSession, token_ids: Tensor, bit_widths: Tensor, *, rows: Tensor | None = None) -> object:
            output = right(session, token_ids, bit_widths, rows=rows)
            if token_ids.shape[1] == 3:
                output.logits[0, 1, 7] += 1e-6
            return output

        monkeypatch.setattr(LeanSession, "extend", wrong)
        with pytest.raises(BenchRefusedError, match="over 3 tokens at 4 bits"):
            bench_verify(self.CONFIG)

    @pytest.mark.parametrize("num_tokens", [(), (2, 4), (1, 17)], ids=str)
    def test_numbers_of_tokens_that_make_no_rows(self, num_tokens: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="--num-tokens 1"):
            replace(self.CONFIG, num_tokens=num_tokens).validate()


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python and gguf are not installed")
class TestLlamaCpp:
    def relative_error(self, tmp_path: Path, gguf_type: bench_llama_cpp.GgufType) -> float:
        """Of the logits after a prompt read as a whole and then token by token, against Hugging Face."""
        torch.manual_seed(0)
        hf_model = random_llama(TINY_LLAMA)
        for name, parameter in hf_model.named_parameters():
            if "_proj" in name:
                parameter.mul_(8)  # sharp attention: a rotation of the wrong rows shows
        token_ids = torch.randint(TINY_LLAMA.vocab, (1, 9))
        expected = hf_model(token_ids).logits[0, -1].numpy()
        path = tmp_path / "model.gguf"
        write_gguf(hf_model, path, gguf_type)
        session = LlamaCppSession(path, max_length=16, num_threads=1)
        session.prefill([1, 2, 3])  # forgotten by the next prompt
        logits = session.prefill(token_ids[0, :5].tolist())
        for token_id in token_ids[0, 5:].tolist():
            logits = session.step(token_id).copy()  # valid until the next call
        session.truncate(5)
        batch = session.extend(token_ids[0, 5:].tolist())
        assert np.allclose(batch[-1], logits, rtol=0.05, atol=0.05 * float(np.abs(logits).max()))
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        session.close()
        session.close()
        return error

    def test_same_model_as_hugging_face(self, tmp_path: Path) -> None:
        errors = {gguf_type: self.relative_error(tmp_path, gguf_type) for gguf_type in GGUF_BITS}
        assert errors["Q8_0"] < 0.05
        assert errors["Q8_0"] < errors["Q4_0"] < 0.6

    def test_rows_of_a_head_are_permuted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(bench_llama_cpp._INTERLEAVED, "llama", False)
        assert self.relative_error(tmp_path, "Q8_0") > 0.1

    @needs_library
    def test_decode_rows(self) -> None:
        found = {row["provider"]: row for row in bench_decode(TINY_LLAMA)}
        assert found["llama_cpp_q4_0"]["num_samples"] == 4
        assert found["llama_cpp_q8_0"]["bytes"] > found["llama_cpp_q4_0"]["bytes"]
        assert found["lean"]["times_faster_than"].keys() >= {"llama_cpp_q4_0", "llama_cpp_q8_0"}
