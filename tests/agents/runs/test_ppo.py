"""PPO: it solves tasks whose best reward is known, and an interruption changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_session import NUM_CLASSES, FakeModel, FakeSession, fake_profile, optimal_bit_widths, token_class
from policy_checks import fake_context
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO
from stable_baselines3.common.logger import KVWriter
from torch import Tensor
from toy_training import (
    TOY_CONFIG,
    TOY_PPO,
    UnitModel,
    best_reward,
    mean_reward,
    toy_env,
    toy_front,
    toy_policy,
    toy_training,
    toy_windows,
)

from flexquant_rl.agents.config import PPOConfig
from flexquant_rl.agents.policies.random_widths import RandomWidths
from flexquant_rl.agents.runs.actor_critic import ActorCriticNet
from flexquant_rl.agents.runs.imitation import collect_signals
from flexquant_rl.agents.runs.ppo import TrainingCallback, build_ppo, learn, precision_net
from flexquant_rl.engine.control.decision import Decision, StaticAllocation
from flexquant_rl.engine.control.policy import PrecisionNet
from flexquant_rl.engine.control.signals import SignalSchema
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.files import read_tensors, write_tensors
from flexquant_rl.fq_env.config import EnvConfig
from flexquant_rl.fq_env.episodes import Episodes
from flexquant_rl.fq_env.vec_env import DecodeVecEnv

ROLLOUT = TOY_PPO.num_envs * TOY_CONFIG.max_new_tokens
SMALL = PPOConfig(num_envs=8, batch_size=32, num_epochs=2, learning_rate=3e-3)
SMALL_ROLLOUT = SMALL.num_envs * TOY_CONFIG.max_new_tokens


def train(model: FakeModel, path: Path, num_updates: int, *, static: bool, seed: int = 0) -> TrainingCallback:
    """PPO from random weights; no cloning, so that all that is known afterwards was learned."""
    front = toy_front(model)
    env = toy_env(model, seed=seed, static=front if static else None)
    ppo, callback = toy_training(env, model, path / "checkpoint.safetensors", seed=seed)
    signals = collect_signals(env, front, torch.Generator().manual_seed(seed))
    precision_net(ppo).set_normalisation(signals)
    learn(ppo, callback, num_updates * ROLLOUT, path / "tensorboard")
    return callback


def best_net(callback: TrainingCallback, model: FakeModel) -> ActorCriticNet:
    net = ActorCriticNet(SignalSchema(model.num_units, model.bit_widths))
    net.load_state_dict(callback.best_state)
    return net


def random_reward(model: FakeModel) -> float:
    """The best that random widths of any mean reach."""
    means = (3.5, 4.0, 4.5, 5.0, 6.0)
    return max(mean_reward(RandomWidths(mean).bind(fake_context(model)), model, toy_windows()) for mean in means)


def test_ppo_finds_the_best_width_of_each_unit(tmp_path: Path) -> None:
    model = UnitModel()
    callback = train(model, tmp_path, 12, static=False)
    best = best_reward(model, toy_windows())
    learned = mean_reward(toy_policy(best_net(callback, model), model), model, toy_windows())
    assert callback.first_score < 0.5 * best  # it started from nothing
    assert random_reward(model) < 0.85 * best
    assert 0.95 * best <= learned <= 1.0001 * best


def test_ppo_reads_the_token(tmp_path: Path) -> None:
    """Each class of tokens needs another unit: no allocation that ignores the token comes near the optimum."""
    model = FakeModel()
    callback = train(model, tmp_path, 18, static=True)
    best = best_reward(model, toy_windows())
    policy = toy_policy(best_net(callback, model), model)
    learned = mean_reward(policy, model, toy_windows())
    assert TOY_CONFIG.kl_weight is not None
    allocation = toy_front(model).allocate(torch.tensor([TOY_CONFIG.kl_weight]))[0]
    static = mean_reward(StaticAllocation("static", allocation), model, toy_windows())
    assert callback.first_score < 0.5 * best
    assert static < 0.8 * best
    assert random_reward(model) < static
    assert 0.95 * best <= learned <= 1.0001 * best
    # And it is the token that decides: the unit that the class needs runs higher than the others.
    windows, rows = toy_windows(), torch.arange(64)
    episodes = Episodes(FakeSession(model, num_rows=64), fake_profile(model), windows, TOY_CONFIG)
    episodes.start(rows, rows, torch.full((64,), TOY_CONFIG.kl_weight), torch.zeros_like(rows))
    widths = policy(episodes.signals()).bit_widths
    needed = token_class(windows[:, TOY_CONFIG.prompt_tokens]) % model.num_units
    own = widths.gather(1, needed[:, None])[:, 0]
    others = (widths.sum(1) - own) / (model.num_units - 1)
    assert float((own > others).float().mean()) >= 0.95


def test_the_optimum_is_by_brute_force() -> None:
    """`optimal_bit_widths` against nested loops over one token, so that what PPO is measured by is right."""
    model = FakeModel()
    cost = fake_profile(model).cost
    for token in range(4, 4 + NUM_CLASSES):
        rewards: dict[tuple[int, ...], float] = {}
        for a in model.bit_widths:
            for b in model.bit_widths:
                for c in model.bit_widths:
                    for d in model.bit_widths:
                        widths = torch.tensor([a, b, c, d])
                        kl = float(model.own_kl_nats(torch.tensor(token), widths))
                        rewards[a, b, c, d] = 1 - float(cost.time_share(widths)) - 4.0 * kl
        best = max(rewards, key=rewards.__getitem__)
        assert optimal_bit_widths(model, torch.tensor([token]), 4.0)[0].tolist() == list(best)


def test_the_policy_is_the_network(tmp_path: Path) -> None:
    model = FakeModel()
    env = toy_env(model, num_envs=8)
    ppo = build_ppo(env, SMALL, seed=0)
    signals = torch.as_tensor(env.reset())
    net = precision_net(ppo)
    actions, values, log_probs = ppo.policy(signals)
    assert actions.shape == (8, 4)
    assert values.shape == (8, 1)
    torch.testing.assert_close(values, net.values(signals))
    torch.testing.assert_close(ppo.policy.predict_values(signals), values)
    per_unit = net.logits(signals).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
    torch.testing.assert_close(log_probs, per_unit.sum(-1))
    again, log_again, entropy = ppo.policy.evaluate_actions(signals, actions)
    torch.testing.assert_close((again, log_again), (values, log_probs))
    probs = net.logits(signals).softmax(-1)
    torch.testing.assert_close(entropy, -(probs * probs.log()).sum((-1, -2)))
    greedy = ppo.predict(signals.numpy(), deterministic=True)[0]
    assert (greedy == net.logits(signals).argmax(-1).numpy()).all()
    optimised = sum(group["params"].__len__() for group in ppo.policy.optimizer.param_groups)
    assert optimised == len(list(net.parameters())) == len(list(ppo.policy.parameters()))


def test_returns_cross_no_episode_and_bootstrap_the_truncated_end(tmp_path: Path) -> None:
    """A rollout's advantages against GAE by hand: the last step adds gamma V(what it leads to), not V(the restart)."""
    model = FakeModel(carry=0.5)
    env = toy_env(model, num_envs=8, static=toy_front(model))
    ppo = build_ppo(env, SMALL, seed=0)
    rewards: list[np.ndarray] = []
    terminal: list[Tensor] = []
    step_wait = env.step_wait

    def spy() -> Any:
        observations, reward, dones, infos = step_wait()
        rewards.append(reward.copy())
        if dones.all():
            terminal.append(torch.as_tensor(np.stack([info["terminal_observation"] for info in infos])))
            assert all(info["TimeLimit.truncated"] for info in infos)
        return observations, reward, dones, infos

    env.step_wait = spy  # type: ignore[method-assign]
    before: list[ActorCriticNet] = []

    class Stop(TrainingCallback):
        def _on_rollout_end(self) -> None:
            net = ActorCriticNet(env.episodes.schema)
            net.load_state_dict(precision_net(self.ppo).state_dict())
            before.append(net)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(ppo, Stop(tmp_path / "c.safetensors", lambda net: 0.0), SMALL_ROLLOUT, tmp_path / "tensorboard")
    buffer, config = ppo.rollout_buffer, SMALL
    observations = torch.as_tensor(buffer.observations)
    with torch.no_grad():
        values = torch.stack([before[0].values(step)[:, 0] for step in observations]).numpy()
        after = before[0].values(terminal[0])[:, 0].numpy()
    following = np.concatenate([values[1:], after[None]])
    deltas = np.stack(rewards) + config.gamma * following - values
    advantages, running = np.zeros_like(deltas), np.zeros(8)
    for step in reversed(range(len(deltas))):
        running = deltas[step] + config.gamma * config.gae_lambda * running
        advantages[step] = running
    assert len(terminal) == 1
    np.testing.assert_allclose(buffer.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(buffer.returns, advantages + values, atol=1e-5)


def test_the_control_variate_takes_away_what_static_gets(tmp_path: Path) -> None:
    """Playing the static allocation itself, with its effects on later tokens, is worth exactly nothing."""
    model = FakeModel(carry=0.5)
    front = toy_front(model)
    config = replace(TOY_CONFIG, kl_weight=None, kl_weight_min=2.0, kl_weight_max=20.0)
    env = toy_env(model, config=config, num_envs=8, static=front)
    env.reset()
    for _ in range(2 * config.max_new_tokens):
        widths = front.allocate(env.episodes.kl_weight)
        _, rewards, _, infos = env.step(env.task.to_actions(Decision(widths)).numpy())
        np.testing.assert_allclose(rewards, 0, atol=1e-5)
        assert max(abs(info["reward_plain"]) for info in infos) > 0.05


@pytest.mark.parametrize("env_steps", [1, SMALL_ROLLOUT, 3 * SMALL_ROLLOUT - 5])
def test_learning_rates_fall_from_the_first_to_above_zero(tmp_path: Path, env_steps: int) -> None:
    """Totals that are no whole number of rollouts too: SB3's own schedule goes below zero there, and ascends."""
    model = FakeModel()
    ppo, callback = toy_training(toy_env(model, num_envs=8), model, tmp_path / "c.safetensors", ppo_config=SMALL)
    rates: list[float] = []
    step = ppo.policy.optimizer.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        rates.append(ppo.policy.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    ppo.policy.optimizer.step = spy  # type: ignore[method-assign]
    learn(ppo, callback, env_steps, tmp_path / "tensorboard")
    updates = -(-env_steps // SMALL_ROLLOUT)
    assert ppo.num_timesteps == updates * SMALL_ROLLOUT
    expected = [SMALL.learning_rate * (1 - index / updates) for index in range(updates)]
    assert sorted(set(rates), reverse=True) == pytest.approx(expected)


class InterruptedCallback(TrainingCallback):
    """Raises like Ctrl-C at a given env step."""

    stop_at = -1

    def _on_step(self) -> bool:
        if self.num_timesteps == self.stop_at:
            raise KeyboardInterrupt
        return super()._on_step()


def resumable(path: Path) -> tuple[PPO, InterruptedCallback]:
    """New PPO, env and callback, as a new process makes them."""
    model = FakeModel(carry=0.5)
    config = replace(TOY_CONFIG, kl_weight=None, kl_weight_min=2.0, kl_weight_max=20.0)
    env = toy_env(model, config=config, num_envs=SMALL.num_envs, seed=3, static=toy_front(model))
    ppo = build_ppo(env, SMALL, seed=3)
    # Not a reward: a score that rises with every update, so that the best network is always another one.
    return ppo, InterruptedCallback(
        path / "checkpoint.safetensors", lambda net: float(net.width_head.weight.detach().double().square().sum())
    )


def disturb_generators() -> None:
    """What another process' generators look like."""
    torch.manual_seed(12345)
    np.random.seed(999)  # noqa: NPY002


UPDATES = 5


def finished(path: Path) -> tuple[PPO, InterruptedCallback]:
    ppo, callback = resumable(path)
    learn(ppo, callback, UPDATES * SMALL_ROLLOUT, path / "tensorboard")
    return ppo, callback


def assert_same(a: tuple[PPO, TrainingCallback], b: tuple[PPO, TrainingCallback]) -> None:
    """Bit for bit: weights, optimizer, best network, scores, counters, the next random numbers."""
    for left, right in ((a[0].policy.state_dict(), b[0].policy.state_dict()), (a[1].best_state, b[1].best_state)):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    optimizers = [ppo.policy.optimizer.state_dict()["state"] for ppo, _ in (a, b)]
    assert optimizers[0].keys() == optimizers[1].keys()
    for key, state in optimizers[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizers[1][key][name])), (key, name)
    assert (a[1].best_score, a[1].curve) == (b[1].best_score, b[1].curve)
    assert a[0].num_timesteps == b[0].num_timesteps
    assert a[0]._n_updates == b[0]._n_updates
    assert a[1]._updates == b[1]._updates


# In the first rollout, right at the start of one, in the middle of the third, and at the very last step.
@pytest.mark.parametrize("stops", [[24], [SMALL_ROLLOUT + 8], [2 * SMALL_ROLLOUT + 64, 5 * SMALL_ROLLOUT]])
def test_interruption_and_resume_change_nothing(tmp_path: Path, stops: list[int]) -> None:
    expected = finished(tmp_path / "uninterrupted")
    path = tmp_path / "interrupted"
    for number, stop in enumerate(stops):
        disturb_generators()
        ppo, callback = resumable(path)
        if number:
            callback.restore(ppo, ppo.get_env())  # type: ignore[arg-type]
        callback.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            learn(ppo, callback, UPDATES * SMALL_ROLLOUT, path / "tensorboard")
    disturb_generators()
    ppo, callback = resumable(path)
    callback.restore(ppo, ppo.get_env())  # type: ignore[arg-type]
    assert ppo.num_timesteps == (stops[-1] - 1) // SMALL_ROLLOUT * SMALL_ROLLOUT
    learn(ppo, callback, UPDATES * SMALL_ROLLOUT, path / "tensorboard")
    assert_same(expected, (ppo, callback))


def test_only_episodes_that_are_played_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reset for every rollout, none behind the last one; the weights are those of eager restarts."""
    resets: list[int] = []
    reset = DecodeVecEnv.reset
    monkeypatch.setattr(DecodeVecEnv, "reset", lambda self: resets.append(1) or reset(self))
    lazy = finished(tmp_path / "lazy")
    assert len(resets) == UPDATES
    monkeypatch.setattr(TrainingCallback, "_on_training_start", lambda self: None)
    eager = finished(tmp_path / "eager")
    assert len(resets) == UPDATES + UPDATES + 1
    assert_same(lazy, eager)


def test_training_changes_every_weight(tmp_path: Path) -> None:
    """What the comparison above would not see: weights that stay as they were made."""
    ppo, _ = resumable(tmp_path)
    start = {name: tensor.clone() for name, tensor in ppo.policy.state_dict().items()}
    trained, callback = finished(tmp_path)
    moved = [name for name, tensor in trained.policy.state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(list(precision_net(trained).parameters()))
    assert callback.best_score > callback.first_score


def test_best_network_is_kept_not_the_last(tmp_path: Path) -> None:
    model = FakeModel()
    env = toy_env(model, num_envs=8)
    ppo = build_ppo(env, SMALL, seed=0)
    scores = iter([1.0, 3.0, 2.0, 0.0])
    states: list[dict[str, Tensor]] = []

    def validate(net: PrecisionNet) -> float:
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return next(scores)

    callback = TrainingCallback(tmp_path / "checkpoint.safetensors", validate, validate_every=1)
    learn(ppo, callback, 3 * SMALL_ROLLOUT, tmp_path / "tensorboard")
    assert (callback.first_score, callback.best_score, callback.last_score) == (1.0, 3.0, 0.0)
    assert callback.curve == [(0, 1.0), (SMALL_ROLLOUT, 3.0), (2 * SMALL_ROLLOUT, 2.0), (3 * SMALL_ROLLOUT, 0.0)]
    assert len(states) == 4  # before each update and after the last
    for name, tensor in callback.best_state.items():
        assert torch.equal(tensor, states[1][name])
    assert any(not torch.equal(states[1][name], states[3][name]) for name in states[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    ppo, callback = resumable(path)
    callback.stop_at = SMALL_ROLLOUT + 8
    with pytest.raises(KeyboardInterrupt):
        learn(ppo, callback, 2 * SMALL_ROLLOUT, path / "tensorboard")
    return path / "checkpoint.safetensors"


def rewritten(source: Path, target: Path, *, drop: str = "", **facts: Any) -> None:
    """Copies a checkpoint without some tensors and with other facts."""
    tensors, metadata = read_tensors(source, fix="")
    tensors = {name: tensor for name, tensor in tensors.items() if not drop or not name.startswith(drop)}
    merged = {name: value for name, value in (json.loads(metadata["facts"]) | facts).items() if value is not None}
    write_tensors(target, tensors, {"facts": json.dumps(merged)})


@pytest.mark.parametrize(
    "damage", ["empty", "half", "text", "flip", "no_digest", "no_facts", "no_policy", "no_rng", "shape", "fact_missing"]
)
def test_damaged_checkpoint(tmp_path: Path, checkpoint: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint" * 100)
    elif damage == "flip":
        path.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    elif damage == "no_digest":
        save_file(load_file(checkpoint), path)
    elif damage == "no_facts":
        write_tensors(path, load_file(checkpoint))
    elif damage == "no_policy":
        rewritten(checkpoint, path, drop="policy.")
    elif damage == "no_rng":
        rewritten(checkpoint, path, drop="rng.numpy")
    elif damage == "shape":
        tensors, metadata = read_tensors(checkpoint, fix="")
        write_tensors(path, tensors | {"policy.net.value_head.weight": torch.zeros(1, 3)}, metadata)
    else:
        rewritten(checkpoint, path, updates=None)
    ppo, callback = resumable(tmp_path)
    with pytest.raises(InputError, match="damaged") as error:
        callback.restore(ppo, ppo.get_env())  # type: ignore[arg-type]
    assert str(path) in str(error.value)
    assert "delete it" in str(error.value)


def test_checkpoint_holds_no_pickle(checkpoint: Path) -> None:
    facts = json.loads(read_tensors(checkpoint, fix="")[1]["facts"])
    assert facts["num_timesteps"] == SMALL_ROLLOUT
    assert facts["updates"] == 1
    assert [file.name for file in checkpoint.parent.iterdir() if file.is_file()] == [checkpoint.name]


def test_logged_numbers_belong_to_their_rollout(tmp_path: Path) -> None:
    """TensorBoard's rows: means over the rollout that has just ended, at its number of env steps."""
    model = FakeModel()
    env = toy_env(model, num_envs=8, static=toy_front(model))
    ppo, callback = toy_training(env, model, tmp_path / "checkpoint.safetensors", ppo_config=SMALL)
    rows: list[tuple[int, dict[str, float]]] = []
    plain: list[float] = []
    step_wait = env.step_wait

    def spy() -> Any:
        result = step_wait()
        plain.extend(info["reward_plain"] for info in result[3])
        return result

    env.step_wait = spy  # type: ignore[method-assign]

    class Writer(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            rows.append((step, dict(key_values)))

        def close(self) -> None:
            pass

    set_logger = ppo.set_logger

    def with_writer(logger: Any) -> None:
        logger.output_formats.append(Writer())
        set_logger(logger)

    ppo.set_logger = with_writer  # type: ignore[method-assign]
    learn(ppo, callback, 2 * SMALL_ROLLOUT, tmp_path / "tensorboard")
    # The clone's score; then, after each rollout, what it gave, and after the update what that did.
    done = (0, SMALL_ROLLOUT, SMALL_ROLLOUT, 2 * SMALL_ROLLOUT, 2 * SMALL_ROLLOUT)
    assert tuple(step for step, _ in rows) == done
    assert rows[0][1].keys() == {"validation/reward_over_static"}
    for index, (_, values) in enumerate(rows[1::2]):
        mean = np.mean(plain[index * SMALL_ROLLOUT : (index + 1) * SMALL_ROLLOUT])
        assert values["reward/total"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
        assert values["reward/time_saved"] - values["reward/kl_cost"] == pytest.approx(values["reward/total"], abs=1e-4)
        assert 3 <= values["bits/mean"] <= 8
        assert all(3 <= values[f"bits/{unit.name}"] <= 8 for unit in model.units)
    assert all(values["policy/policy_entropy"] > 0 for _, values in rows[2::2])


def test_free_running_text_trains_too(tmp_path: Path) -> None:
    """Without replay there is no control variate, and EOS ends rows at different times: rollouts still line up."""
    model = FakeModel()
    config = EnvConfig(prompt_tokens=4, max_new_tokens=16, kl_weight=4.0, source="free", temperature=1.0)
    env = toy_env(model, config=config, num_envs=8, eos_token_ids=(7,))
    ppo, callback = toy_training(env, model, tmp_path / "checkpoint.safetensors", ppo_config=SMALL)
    learn(ppo, callback, 2 * SMALL_ROLLOUT, tmp_path / "tensorboard")
    assert ppo.num_timesteps == 2 * SMALL_ROLLOUT
    assert all(bool(tensor.isfinite().all()) for tensor in ppo.policy.state_dict().values())
