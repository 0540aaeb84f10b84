"""Recordings: what is in them, how they go on after an interruption, what is refused."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import tree
from toy_traces import random_traces

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control import recording
from flexquant_rl.engine.control.recording import check_plan, record, record_sequence
from flexquant_rl.engine.control.signals import OUTPUT_SIGNALS, log_probabilities, project_embedding
from flexquant_rl.engine.control.traces import (
    NO_TOKEN,
    PlannedSequence,
    RecordingPlan,
    read_plan,
    read_traces,
    sequence_path,
    start_recording,
)
from flexquant_rl.engine.decoding.choice import default_decoder, session_opener
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig

TOKENS, DEPTH, WIDTHS = 9, 3, (3, 5)


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig())


def plan_for(model: NestedCausalLM, decoder: Any, count: int = 3) -> RecordingPlan:
    generator = torch.Generator().manual_seed(count)
    prompts = torch.randint(97, 123, (count, 6), generator=generator).tolist()
    sequences = tuple(PlannedSequence(tuple(prompt), "train", index, "x") for index, prompt in enumerate(prompts))
    eos = tuple(model.eos_token_ids)
    return RecordingPlan(model.fingerprint, decoder, 8, WIDTHS, DEPTH, TOKENS, eos, sequences)


@pytest.mark.parametrize("decoder", ["lean", "hf"])
def test_every_draft_is_what_the_decoder_says_from_a_clean_past(nested: NestedCausalLM, decoder: Any) -> None:
    if decoder == "lean" and default_decoder(nested)[0] != "lean":
        pytest.skip("the native kernels could not be built")
    plan = plan_for(nested, decoder, 1)
    opener = session_opener(nested, max_length=40, decoder=decoder)
    prompt = plan.sequences[0].prompt_ids
    trace = record_sequence(plan, opener(1), prompt)
    assert trace is not None
    assert trace.num_tokens == TOKENS
    text = trace.token_ids.tolist()
    full = torch.full((nested.num_units,), 8)
    for position in range(TOKENS):
        session = opener(1)
        output = session.prefill(torch.tensor([prompt]), bit_widths=full).logits
        for token in text[:position]:
            output = session.step(torch.tensor([token]), full).logits
        assert output.argmax().item() == text[position]
        check_signals(trace.settled_signals[position], output[0])
        for level, width in enumerate(WIDTHS):
            twin, token, before = session.fork(), text[position], output
            for index in range(DEPTH):
                if position + 1 + index >= TOKENS:
                    assert trace.draft_ids[position, level, index] == NO_TOKEN
                    assert not trace.draft_signals[position, level, index].any()
                    continue
                drafted = twin.step(torch.tensor([token]), torch.full_like(full, width)).logits
                token = int(drafted.argmax())
                assert trace.draft_ids[position, level, index] == token
                check_signals(trace.draft_signals[position, level, index], drafted[0], before[0])
                before = drafted


def test_levels_between_stored_widths(nested: NestedCausalLM, tmp_path: Path) -> None:
    """A level may be any allocation; recordings of whole widths are what they were."""
    units = nested.num_units
    allocation = tuple(3 if unit % 2 else 5 for unit in range(units))
    whole = plan_for(nested, "hf", 1)
    plan = replace(whole, draft_widths=(3, 4.1, 5), mixed=(allocation,))
    assert plan.levels(units).tolist() == [[3] * units, [*allocation], [5] * units]
    assert len({plan.digest(), replace(plan, mixed=((3,) * units,)).digest(), whole.digest()}) == 3
    start_recording(tmp_path / "mixed", plan)
    start_recording(tmp_path / "whole", whole)
    assert (read_plan(tmp_path / "mixed"), read_plan(tmp_path / "whole")) == (plan, whole)
    assert "mixed" not in json.loads((tmp_path / "whole" / "recording.json").read_text())
    opener = session_opener(nested, max_length=40, decoder="hf")
    prompt = plan.sequences[0].prompt_ids
    found, alone = record_sequence(plan, opener(1), prompt), record_sequence(whole, opener(1), prompt)
    assert found is not None
    assert alone is not None
    assert torch.equal(found.draft_ids[:, [0, 2]], alone.draft_ids)
    session = opener(1)
    session.prefill(torch.tensor([prompt]))
    token = int(found.token_ids[0])
    for index in range(DEPTH):
        token = int(session.step(torch.tensor([token]), torch.tensor(allocation)).logits.argmax())
        assert found.draft_ids[0, 1, index] == token


def check_signals(found: torch.Tensor, logits: torch.Tensor, before: torch.Tensor | None = None) -> None:
    """Against float64."""
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    top = probs.sort(descending=True).values
    values = dict(zip(OUTPUT_SIGNALS, found.tolist(), strict=True))
    assert values["token_entropy_nats"] == pytest.approx(float(-(probs * log_probs).sum()), rel=1e-4)
    assert values["top1_probability"] == pytest.approx(float(top[0]), rel=1e-4)
    assert values["top_margin"] == pytest.approx(float(top[0] - top[1]), abs=1e-5)
    assert values["surprisal_nats"] == pytest.approx(float(-top[0].log()), rel=1e-4, abs=1e-6)
    if before is not None:
        kl = float((probs * (log_probs - before.double().log_softmax(-1))).sum())
        assert values["step_kl_nats"] == pytest.approx(kl, rel=1e-3, abs=1e-5)


def test_rounds_of_the_decoder_itself_accept_what_the_traces_say(nested: NestedCausalLM) -> None:
    """Drafts and one verifying `extend` on one cache, as the live loop does it."""
    decoder = default_decoder(nested)[0]
    plan = plan_for(nested, decoder, 1)
    opener = session_opener(nested, max_length=40, decoder=decoder)
    trace = record_sequence(plan, opener(1), plan.sequences[0].prompt_ids)
    assert trace is not None
    text, full = trace.token_ids.tolist(), torch.full((nested.num_units,), 8)
    session = opener(1)
    session.prefill(torch.tensor([plan.sequences[0].prompt_ids]), bit_widths=full)
    for level, width in enumerate(WIDTHS):
        session.prefill(torch.tensor([plan.sequences[0].prompt_ids]), bit_widths=full)
        position = 0
        while position + DEPTH < TOKENS:
            held, token, drafts = session.lengths.clone(), text[position], list[int]()
            for _ in range(DEPTH):
                token = int(session.step(torch.tensor([token]), torch.full_like(full, width)).logits.argmax())
                drafts.append(token)
            session.truncate(held)
            verified = session.extend(torch.tensor([[text[position], *drafts]]), full).logits[0].argmax(-1).tolist()
            accepted = next((i for i in range(DEPTH) if drafts[i] != verified[i]), DEPTH)
            assert drafts == trace.draft_ids[position, level].tolist()
            assert verified[: accepted + 1] == text[position + 1 : position + accepted + 2]
            session.truncate(held + accepted + 1)
            position += accepted + 1


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_interrupted_recording_goes_on_to_the_same_bytes(
    nested: NestedCausalLM, tmp_path: Path, num_threads: int
) -> None:
    plan = plan_for(nested, default_decoder(nested)[0], 4)
    assert record(plan, nested, tmp_path / "whole") == 4

    def interrupted(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
        for done, item in enumerate(items):
            if done == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        record(plan, nested, tmp_path / "parts", num_threads=num_threads, progress=interrupted)
    with pytest.raises(InputError, match="of 4 sequences are recorded; run the same"):
        read_traces(tmp_path / "parts")
    assert record(plan, nested, tmp_path / "parts", num_threads=num_threads) <= 2
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    for name in tree(tmp_path / "whole"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert record(plan, nested, tmp_path / "parts") == 0
    traces = read_traces(tmp_path / "parts")
    assert traces.plan == plan
    expected = project_embedding(nested.embedding_matrix(), 32)[traces.embedding_ids]
    torch.testing.assert_close(traces.embedding, expected)


def test_a_sequence_that_is_stopped_is_none(nested: NestedCausalLM) -> None:
    plan = plan_for(nested, "hf", 1)
    stop = threading.Event()
    stop.set()
    session = session_opener(nested, max_length=40, decoder="hf")(1)
    assert record_sequence(plan, session, plan.sequences[0].prompt_ids, stop) is None


@pytest.fixture
def recorded(nested: NestedCausalLM, tmp_path: Path) -> Path:
    record(plan_for(nested, "hf", 2), nested, tmp_path / "recorded")
    return tmp_path / "recorded"


def test_damaged_and_foreign_files_are_one_line(nested: NestedCausalLM, recorded: Path, tmp_path: Path) -> None:
    path = sequence_path(recorded, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(InputError, match="damaged"):
        read_traces(recorded)
    path.write_bytes(sequence_path(recorded, 0).read_bytes())
    with pytest.raises(InputError, match="belongs to another recording or place"):
        read_traces(recorded)
    path.write_bytes(whole)
    read_traces(recorded)
    (recorded / "embedding.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match="belongs to another recording"):
        read_traces(recorded)
    other = plan_for(nested, "hf", 3)
    with pytest.raises(InputError, match="a recording with other sequences"):
        start_recording(recorded, other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        start_recording(tmp_path / "full", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "traces of version 7, this is 1"),
        ({"depth": 0}, "depth is 1 to 15"),
        ({"depth": "3"}, "numbers are whole"),
        ({"decoder": "gpu"}, "decoder is lean or hf"),
        ({"draft_widths": [9]}, "bit_widths are not whole numbers"),
        ({"draft_widths": [5, 3]}, "draft widths ascend|do not ascend"),
        ({"draft_widths": [3, 3.5]}, "an allocation for each width that is not whole"),
        ({"mixed": [[3, 4]]}, "an allocation for each width that is not whole"),
        ({"draft_widths": [3.5], "mixed": [[3, 9]]}, "an allocation for each width that is not whole"),
        ({"draft_widths": ["3"]}, "bit_widths are not whole numbers"),
        ({"draft_widths": [math.inf]}, "draft widths ascend|not whole numbers|an allocation"),
        ({"sequences": []}, "there is a sequence"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_plan_that_is_none_is_one_line(recorded: Path, change: dict[str, Any], message: str) -> None:
    path = recorded / "recording.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        read_plan(recorded)
    path.write_text("[3")
    with pytest.raises(InputError, match="no readable recording"):
        read_plan(recorded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "the traces are of model 000000000000"),
        ({"verify_width": 7}, "width 7 is not stored"),
        ({"draft_widths": (3, 8)}, "must be one or more below the verify width 8"),
        ({"draft_widths": ()}, "must be one or more below"),
        ({"draft_widths": (3.5,), "mixed": ((3,),)}, "an allocation is not for"),
        ({"draft_widths": (3.5,), "mixed": ((3, 7),)}, "width 7 is not stored"),
        ({"depth": 16}, "depth=16 must be 1 to 15"),
        ({"max_new_tokens": 1}, "leaves nothing to draft"),
    ],
)
def test_plans_that_do_not_fit_the_model(nested: NestedCausalLM, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_plan(replace(plan_for(nested, "hf"), **change), nested)


def test_a_decoder_that_cannot_run_leaves_nothing(
    nested: NestedCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "why_not_lean", lambda model: "it is another kind")
    with pytest.raises(
        InputError, match="the lean decoder cannot run this model .it is another kind.; use --decoder hf"
    ):
        recording.record(replace(plan_for(nested, "hf"), decoder="lean"), nested, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_log_probabilities_have_a_floor() -> None:
    assert log_probabilities(torch.tensor([[0.0, 1e4]])).tolist() == [[-110.0, 0.0]]


def test_the_tests_own_traces_are_whole() -> None:
    import numpy as np

    traces = random_traces(np.random.default_rng(0))
    assert all(trace.draft_ids.shape[1:] == (3, 4) for trace in traces.sequences)
