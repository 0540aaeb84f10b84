"""The model as lm-evaluation-harness asks for it, against the unquantised and the full-width model read in one pass."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

import lm_eval
from document_blocks import DOCS, run_blocks
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from flexquant_rl import load_model
from flexquant_rl.agents.commands.servable import load_servable
from flexquant_rl.agents.tasks.harness import MODEL_NAME, FlexQuantLM
from flexquant_rl.agents.tasks.local_tasks import LOCAL_TASKS, make_task
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import generate

CONTEXT, ENDINGS = "the cat sat on", (" a mat", " the red fox and ran", " x")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir))


def asks(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def expected(model: NestedCausalLM, context: str, ending: str, bit_widths: torch.Tensor | None) -> tuple[float, bool]:
    ids = torch.tensor([model.tokenizer(context + ending)["input_ids"]])
    count = len(model.tokenizer(ending, add_special_tokens=False)["input_ids"])
    logits = DecodeSession(model).score(ids[:, :-1], bit_widths)[0, -count:].double()
    chosen = ids[0, -count:]
    nats = logits.log_softmax(-1).gather(1, chosen[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == chosen).all())


@pytest.mark.parametrize("policy", ["full", "fixed:8"])
def test_likelihoods_are_those_of_one_pass(policy: str, tiny_model_dir: Path, model: NestedCausalLM) -> None:
    lm = FlexQuantLM(str(tiny_model_dir), policy, decoder="hf", batch_size="2")
    found = lm.loglikelihood(asks(*((CONTEXT, ending) for ending in ENDINGS)))
    widths = None if policy == "full" else torch.full((model.num_units,), 8)
    for (nats, greedy), ending in zip(found, ENDINGS, strict=True):
        wanted, is_greedy = expected(model, CONTEXT, ending, widths)
        assert nats == pytest.approx(wanted, abs=1e-3)
        assert greedy is is_greedy


def test_a_width_is_read_where_it_is_chosen(tiny_model_dir: Path) -> None:
    """Behind the first token of a continuation three bits say something else than eight."""
    low, high = (FlexQuantLM(str(tiny_model_dir), f"fixed:{bits}") for bits in (3, 8))
    first, later = asks((CONTEXT, " ")), asks((CONTEXT, ENDINGS[1]))
    assert low.loglikelihood(first) == high.loglikelihood(first)
    assert low.loglikelihood(later) != high.loglikelihood(later)


@pytest.mark.parametrize("name", ["draft:3,length=3", "lookups"])
def test_verified_results_are_those_of_the_verify_width(tiny_model_dir: Path, name: str) -> None:
    drafts, plain = (FlexQuantLM(str(tiny_model_dir), policy) for policy in (name, "fixed:8"))
    pairs = asks(*((CONTEXT, ending) for ending in ENDINGS))
    prompts = asks(*((prompt, {"until": ["q"], "max_gen_toks": 24}) for prompt in ("abc", "the fox", "")))
    assert drafts.loglikelihood(pairs) == plain.loglikelihood(pairs)
    assert drafts.generate_until(prompts) == plain.generate_until(prompts)


def test_texts_are_those_of_generate(tiny_model_dir: Path) -> None:
    found = load_servable(str(tiny_model_dir), "fixed:4")
    lm = FlexQuantLM(str(tiny_model_dir), "fixed:4")
    (text,) = lm.generate_until(asks((CONTEXT, {"until": ["z"], "max_gen_toks": 20})))
    tokens = generate(found.model, found.policy, found.profile, CONTEXT, max_new_tokens=20, stop="z")
    assert text == "".join(token.text for token in tokens) != ""
    assert len(text) <= 20


def test_long_prompts_lose_their_beginning(tiny_model_dir: Path) -> None:
    lm = FlexQuantLM(str(tiny_model_dir), "fixed:8", max_length=40)
    asked = {"until": [], "max_gen_toks": 10}
    long, short = lm.generate_until(asks(("a" * 300 + CONTEXT, asked), ("a" * 17 + CONTEXT, asked)))
    assert long == short
    (nats, _), (same, _) = lm.loglikelihood(asks(("b" * 300 + "c" * 60, "dd"), ("c" * 60, "dd")))
    assert nats == same


def test_rolling_likelihoods_are_of_every_token(tiny_model_dir: Path) -> None:
    text = "the cat sat on a mat and ran"
    whole, halves = (FlexQuantLM(str(tiny_model_dir), "full", max_length=length) for length in (64, 16))
    (nats,) = whole.loglikelihood_rolling(asks((text,)))
    ((scored, _),) = whole.loglikelihood(asks(("", text)))
    assert nats == pytest.approx(scored, abs=1e-4)
    (in_parts,) = halves.loglikelihood_rolling(asks((text,)))
    assert in_parts < 0
    assert in_parts != pytest.approx(nats, abs=1e-4)


def test_special_tokens_are_not_added_twice(tiny_model_dir: Path) -> None:
    lm = FlexQuantLM(str(tiny_model_dir), "fixed:8")
    assert lm.tok_encode("<s>ab") == [1, ord("a"), ord("b")]
    assert (lm.prefix_token_id, lm.eot_token_id) == (1, 2)


def test_chats_go_through_the_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    lm = FlexQuantLM(str(tiny_model_dir), "fixed:4")
    lm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    (tmp_path / "rows.jsonl").write_text('{"q": "ab", "a": "x"}\n' * 2, encoding="utf-8")
    task = {
        "task": "chat",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "chat.yaml").write_text(json.dumps(task), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        lm, tasks=["chat"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0, log_samples=True
    )
    (prompt, _), *_ = results["samples"]["chat"][0]["arguments"]
    assert prompt == "<s>ab</s>"
    assert lm.tok_encode(prompt) == [1, ord("a"), ord("b"), 2]


def test_the_harness_knows_its_name(repo_root: Path) -> None:
    assert get_model(MODEL_NAME) is FlexQuantLM
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lm_eval.models"][MODEL_NAME].partition(":")
    assert getattr(import_module(module), name) is FlexQuantLM


def test_the_block_of_the_document_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_task(LOCAL_TASKS["line"], []).write(tmp_path / "OUT" / "tasks")
    names, printed = run_blocks(DOCS / "tasks.md", tmp_path, {'"MODEL"': repr(str(tiny_model_dir))})
    assert len(printed) == 1
    assert names["results"]["results"]["line"]["exact_match,stripped"] == 0


def test_arguments_come_as_text(tiny_model_dir: Path) -> None:
    given = f"model={tiny_model_dir},policy=fixed:4,max_length=32,threads=1"
    lm = FlexQuantLM.create_from_arg_string(given, {"batch_size": 1, "device": None})
    assert lm.max_length == 32
    with pytest.raises(InputError, match="kl_weight 3 sets a dial, and fixed:4 has none"):
        FlexQuantLM(str(tiny_model_dir), "fixed:4", kl_weight="3")


def test_full_precision_needs_unquantised_weights(tiny_model_dir: Path, model: NestedCausalLM) -> None:
    from flexquant_rl.agents.tasks.reference import ReferenceEngine

    nested = load_model(str(tiny_model_dir), keep_reference=False)
    with pytest.raises(InputError, match="name the model that it was made from with --reference DIR"):
        ReferenceEngine(nested)
    assert ReferenceEngine(model).loglikelihood([], kl_weight=1.0) == []
