"""The Gymnasium environment: one sequence, one decode step per env step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from flexquant_rl.engine.checkpoint import load_model
from flexquant_rl.engine.control.cost import roofline_cost
from flexquant_rl.engine.control.profile import Profile, profile_model
from flexquant_rl.engine.control.signals import SIGNAL_LIMIT
from flexquant_rl.engine.decoding.choice import DecoderName, open_session
from flexquant_rl.engine.embedded import resolve_model
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.quantisation.quantize import QuantizationConfig
from flexquant_rl.fq_env.batch import DecodeBatch
from flexquant_rl.fq_env.prompts import Split, load_windows, spread
from flexquant_rl.fq_env.task import ActionMap, EnvConfig, check_kl_weight, draw_kl_weight

Observation = NDArray[np.float32]

_PROFILE_WINDOWS = 8


class PrecisionEnv(gym.Env[Observation, NDArray[np.int64]], EzPickle):
    """One sequence through one model, with a bit-width per unit chosen anew for every token.

    ## Description
    A language model reads or writes a text token by token. Before each token an agent chooses how many bits of every
    unit's weights are read. Fewer bits are faster, and move the output distribution away from the full-precision
    model's; keys and values written at few bits also disturb all later tokens of the episode.

    ## Action Space
    `MultiDiscrete([num_widths] * num_units)`: index into the stored widths (default 3, 4, 5, 6, 8) for each unit,
    decoder layers first, the lm_head last. With `action="num_low_units"`: `MultiDiscrete([num_units + 1])`, how many
    units, least sensitive first, run at `low_width`.

    ## Observation Space
    `Box(-10, 10, (num_global + num_units * num_per_unit,), float32)`: the signals of `engine/control/signals.py`, all
    known before the step. Global: entropies, top-1 probability and margin, surprisal of the token to be read, KL
    between the last two outputs, last probe, mean width, position, the dial, and a projection of the input embedding.
    Per unit: profiled sensitivity and time saved at each width, relative residual update, crest, last width, depth.

    ## Rewards
    `speedup - 1 - kl_weight * output_kl_nats`, where `speedup` is latency at the largest width everywhere over latency
    of the step, and the KL is KL(reference || quantised) on the same prefix. The parts are in `info`: `speedup`,
    `latency_ms`, `output_kl_nats`, `reward_latency`, `reward_quality`, `mean_bit_width`, `kl_weight`.

    ## Starting State
    A prompt drawn from the split's text and read at the largest width; a dial drawn log-uniformly unless fixed.

    ## Episode End
    1. Termination: the next token is EOS.
    2. Truncation: `max_new_tokens` steps.

    ## Arguments
    `model`: a Hugging Face directory or hub name, or a nested checkpoint (default: the embedded model). `texts`: files
    (default: held-out standard-library modules). `split`: `train`, `validation` or `test`. `profile`: a `profile.json`
    (default: measured at construction). Any field of `EnvConfig` by name.
    `reset(options={"window": i, "kl_weight": x})` fixes the prompt or the dial.

    ## Version History
    * v0: first version. `FlexQuant/Decode-v0` takes latency from the profile's table and is deterministic;
      `FlexQuant/MeasuredDecode-v0` times each step with the wall clock and is not.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # Gymnasium declares it without ClassVar

    def __init__(
        self,
        model: str | None = None,
        texts: Sequence[str] = (),
        split: Split = "train",
        profile: str | None = None,
        measured: bool = False,
        **config: Any,
    ) -> None:
        EzPickle.__init__(self, model, texts, split, profile, measured, **config)
        self.config = EnvConfig(**config)
        self.config.validate()
        if split not in get_args(Split):
            raise InputError(f"split={split} is not known; choose one of {', '.join(get_args(Split))}")
        paths = [Path(text) for text in ([texts] if isinstance(texts, str) else texts)]
        nested = load_model(resolve_model(model), QuantizationConfig())
        windows = load_windows(nested.tokenizer, self.config.window_tokens, paths)
        self._windows = windows.split(split)
        if profile is not None:
            loaded = Profile.load(Path(profile))
            loaded.check(nested)
        else:
            loaded = profile_model(nested, spread(windows.train, _PROFILE_WINDOWS)[:, :-1], roofline_cost(nested))
        # Timed steps are those of the fastest decoder; the deterministic environment stays with the reference one.
        decoder: DecoderName = "auto" if measured else "hf"
        session = open_session(nested, max_length=self.config.window_tokens - 1, decoder=decoder)
        self._measured = measured
        self._batch = DecodeBatch(
            session,
            loaded,
            self.config,
            num_rows=1,
            eos_token_id=nested.tokenizer.eos_token_id,
            measured=measured,
        )
        self._actions = ActionMap(loaded, self.config)
        self.action_space = gym.spaces.MultiDiscrete(self._actions.choices)
        self.observation_space = gym.spaces.Box(
            -SIGNAL_LIMIT, SIGNAL_LIMIT, (self._batch.schema.dim,), dtype=np.float32
        )

    @property
    def batch(self) -> DecodeBatch:
        """The mechanics, for policies and evaluation."""
        return self._batch

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; `options` may fix `window` (index into the split) and `kl_weight`."""
        super().reset(seed=seed)
        options = options or {}
        index = int(options.get("window", self.np_random.integers(len(self._windows)))) % len(self._windows)
        kl_weight = float(options.get("kl_weight", draw_kl_weight(self.np_random, self.config)))
        check_kl_weight(kl_weight)
        self._batch.reset(
            torch.tensor([0]),
            self._windows[index : index + 1],
            torch.tensor([kl_weight]),
            torch.from_numpy(self.np_random.integers(1 << 62, size=1)),
        )
        if self._measured:
            self._batch.measure_full_step_ms()
        return self._observation(), {"window": index, "kl_weight": kl_weight}

    def step(self, action: NDArray[np.int64]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decodes one token at the chosen widths."""
        widths = self._actions.to_bit_widths(torch.as_tensor(np.asarray(action), dtype=torch.int64).view(1, -1))
        result = self._batch.step(widths)
        info: dict[str, Any] = {**result.infos(self._batch.kl_weight)[0]}
        reward = info.pop("reward_plain")
        return self._observation(), reward, bool(result.terminated), bool(result.truncated), info

    def close(self) -> None:
        """Frees the session; closing twice is fine."""
        if hasattr(self, "_batch"):
            self._batch.close()

    def _observation(self) -> Observation:
        observation: Observation = self._batch.signals()[0].cpu().numpy()
        return observation
