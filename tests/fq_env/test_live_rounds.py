"""Rounds decoded live: those that a recording shows exactly are the same, and the text is the verify width's always."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.recording import record_sequence
from flexquant_rl.engine.control.signals import SignalSchema, project_embedding
from flexquant_rl.engine.control.traces import PlannedSequence, RecordingPlan, Traces, occurring_tokens
from flexquant_rl.engine.control.verify_costs import modelled_costs
from flexquant_rl.engine.decoding.choice import default_decoder, session_opener
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.quantisation.config import QuantizationConfig
from flexquant_rl.fq_env.trace_rounds import TraceRounds
from flexquant_rl.fq_env.vec_env import VerifiedVecEnv
from flexquant_rl.fq_env.verified_making import VectorVerifiedEnvironment, VerifiedEnvironment, make_rounds

DecoderOf = Literal["lean", "hf"]
WIDTHS, DEPTH, TOKENS = (3, 5), 3, 14
COSTS = modelled_costs((0.4, 0.6), (1.0, 1.1), depth=DEPTH)
PROMPTS = ("abc abe abc", "the cat", "x = x +", "123 124 125")


@pytest.fixture(scope="module")
def nested(tiny_model_dir: Path) -> NestedCausalLM:
    return load_model(str(tiny_model_dir), QuantizationConfig(group_size=32))


def recorded(model: NestedCausalLM, decoder: DecoderOf, eos: tuple[int, ...] = ()) -> Traces:
    planned = tuple(
        PlannedSequence((1, *map(ord, prompt)), "test" if index else "train", index, "x")
        for index, prompt in enumerate(PROMPTS)
    )
    plan = RecordingPlan(model.fingerprint, decoder, 8, WIDTHS, DEPTH, TOKENS, eos, planned)
    session = session_opener(model, max_length=64, decoder=decoder)(1)
    traces = [(one, record_sequence(plan, session, one.prompt_ids)) for one in planned]
    kept = [(one, trace) for one, trace in traces if trace is not None]
    sequences = tuple(trace for _, trace in kept)
    ids = occurring_tokens(sequences)
    embedding = project_embedding(model.embedding_matrix(), SignalSchema(1, (8,)).num_embedding_dims)[ids]
    return Traces(plan.of_sequences(tuple(one for one, _ in kept)), sequences, ids, embedding)


@pytest.fixture(scope="module", params=["lean", "hf"])
def decoder(request: pytest.FixtureRequest, nested: NestedCausalLM) -> Any:
    if request.param == "lean" and default_decoder(nested)[0] != "lean":
        pytest.skip("the native kernels could not be built")
    return request.param


@pytest.mark.parametrize(("seed", "ngram_drafts"), [(0, 0), (1, 0), (2, 0), (0, 2), (1, 7)])
def test_rounds_of_one_level_are_those_of_the_recording(
    nested: NestedCausalLM, decoder: DecoderOf, seed: int, ngram_drafts: int
) -> None:
    rng = np.random.default_rng(seed)
    eos = tuple(rng.integers(2, 250, size=60).tolist()) if seed else ()  # some texts end early
    traces = recorded(nested, decoder, eos)
    costs = replace(COSTS, controller_ms=0.01, settled_ms=0.003)
    played, _ = make_rounds(traces, costs, split="test", num_rows=2, ngram_drafts=ngram_drafts)
    live, _ = make_rounds(traces, costs, split="test", num_rows=2, model=nested, ngram_drafts=ngram_drafts)
    assert isinstance(played, TraceRounds)
    ends = dict.fromkeys(("terminated", "truncated"), 0)
    found = 0
    rows = torch.arange(2)
    for _ in range(4):
        windows = torch.from_numpy(rng.integers(len(played.windows), size=2))
        for rounds in (played, live):
            rounds.start(rows, windows, torch.ones(2), torch.zeros(2, dtype=torch.int64))
        levels = rng.integers(2, size=2)
        running = np.ones(2, dtype=np.bool_)
        while running.all():  # a row that has ended is started anew by an environment
            np.testing.assert_array_equal(live.action_masks(), played.action_masks())
            np.testing.assert_allclose(live.signals(), played.signals(), rtol=0, atol=2e-4)
            has_drafts = played._pending > 0
            found += int(played._is_found.sum())
            levels = np.where(has_drafts, levels, rng.integers(2, size=2))
            actions = torch.from_numpy(np.where(rng.random(2) < 0.7, levels + 1, 0))
            expected, facts = played.step(actions), live.step(actions)
            for name, value in vars(expected).items():
                own = getattr(facts, name)
                assert torch.equal(own, value) if isinstance(value, torch.Tensor) else own == value, name
            for name in ends:
                ends[name] += int(getattr(facts, name).sum())
            running = ~(facts.terminated | facts.truncated).numpy()
    assert ends["truncated"] > 0 or eos
    assert ends["terminated"] > 0 or not eos
    assert (found > 0) == (ngram_drafts > 0), "these texts repeat themselves"
    live.close()


@pytest.mark.parametrize("ngram_drafts", [0, 3])
def test_whatever_drafts_the_text_is_that_of_the_verify_width(
    nested: NestedCausalLM, decoder: DecoderOf, ngram_drafts: int
) -> None:
    traces = recorded(nested, decoder)
    env = VerifiedEnvironment(traces, COSTS, split="test", model=nested, render_mode="ansi", ngram_drafts=ngram_drafts)
    rng = np.random.default_rng(5)
    accepted = 0
    for window, index in enumerate(traces.of_split("test")):
        _, info = env.reset(options={"window": window})
        assert env.render() is not None
        total, is_over = 0.0, False
        while not is_over:
            action = int(rng.choice(info["action_mask"].nonzero()[0]))
            _, reward, terminated, truncated, info = env.step(action)
            accepted += info["num_accepted"]
            total, is_over = total + reward, terminated or truncated
        text = traces.sequences[index].token_ids.tolist()
        assert env.rounds.token_ids(0) == text  # type: ignore[union-attr]
        shown = re.sub(r"\x1b\[[0-9;]*m", "", str(env.render()))
        assert shown.startswith(text_of(nested, traces, index))
        assert total < len(text)
    assert accepted > 0, "drafts of mixed rounds are accepted too"
    env.close()


def text_of(model: NestedCausalLM, traces: Traces, index: int) -> str:
    token_ids = traces.sequences[index].token_ids.tolist()
    return str(model.tokenizer.decode(token_ids, skip_special_tokens=True))


def test_checkers_and_rows(nested: NestedCausalLM) -> None:
    traces = recorded(nested, "hf")
    given = {"traces": traces, "costs": COSTS, "split": "test", "model": nested}
    env = gymnasium.make("flexquant_rl.fq_env:FlexQuant/VerifiedDecode-v0", **given)
    check_env(env.unwrapped, skip_render_check=True)
    check_sb3(env.unwrapped)
    batch = VectorVerifiedEnvironment(2, **given)  # type: ignore[arg-type]
    singles = [VerifiedEnvironment(**given) for _ in range(2)]  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    seen, _ = batch.reset(seed=4)
    for row, single in enumerate(singles):
        np.testing.assert_allclose(single.reset(seed=4 + row)[0], seen[row], atol=1e-5)
    for _ in range(40):
        actions = rng.integers(3, size=2)
        seen, rewards, terminated, truncated, _ = batch.step(actions)
        for row, single in enumerate(singles):
            observation, reward, *ended, _ = single.step(int(actions[row]))
            assert (reward, *ended) == (pytest.approx(rewards[row]), terminated[row], truncated[row])
            if any(ended):
                observation, _ = single.reset()
            np.testing.assert_allclose(observation, seen[row], atol=1e-4)
    sb3 = VerifiedVecEnv(*make_rounds(traces, COSTS, split="test", num_rows=2, model=nested), seed=1)
    sb3.reset()
    assert [list(mask) for mask in sb3.env_method("action_masks")] == [[True] * 3] * 2


def test_wrong_models_are_one_line(nested: NestedCausalLM, tmp_path: Path) -> None:
    traces = recorded(nested, "hf")
    with pytest.raises(InputError, match="model=3 must be a directory"):
        make_rounds(traces, COSTS, model=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="missing"):
        make_rounds(traces, COSTS, model=tmp_path / "missing")
    with pytest.raises(InputError, match="the traces are of model"):
        make_rounds(traces, COSTS, model="default")
    with pytest.raises(InputError, match="the traces have 2 levels"):
        make_rounds(traces, modelled_costs((0.4,), (1.0, 1.1), depth=DEPTH), model=nested)
