"""Episodes that start again with the text that they have read: as when one policy after another is compared."""

from __future__ import annotations

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_profile, fake_windows
from torch import Tensor

from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.fq_env.config import EnvConfig, Source
from flexquant_rl.fq_env.episodes import Episodes

ROWS, STEPS = 3, 6
CONFIG = EnvConfig(prompt_tokens=4, max_new_tokens=STEPS)


def start(episodes: Episodes, windows: list[int], *, rows: list[int] | None = None, dial: float = 1.0) -> None:
    chosen = torch.arange(episodes.num_rows) if rows is None else torch.tensor(rows)
    episodes.start(chosen, torch.tensor(windows), torch.full((len(chosen),), dial), chosen)


def drawn_widths(bit_widths: tuple[int, ...], num_units: int, seed: int) -> Tensor:
    """`[STEPS, ROWS, U]`."""
    picks = torch.randint(len(bit_widths), (STEPS, ROWS, num_units), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(bit_widths)[picks]


def test_prompts_of_the_same_text_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    prefill = FakeSession.prefill
    monkeypatch.setattr(FakeSession, "prefill", lambda self, *args, **kw: read.append(1) or prefill(self, *args, **kw))
    model = FakeModel()
    session = FakeSession(model, num_rows=2, max_length=CONFIG.window_tokens - 1)
    episodes = Episodes(session, fake_profile(model), fake_windows(3, CONFIG.window_tokens), CONFIG)
    for windows in ([0, 1], [0, 1], [0, 1], [1, 2]):
        start(episodes, windows)
        episodes.step(Decision(torch.full((2, 4), 4)))
    assert len(read) == 2
    start(episodes, [0], rows=[1])
    start(episodes, [1, 2])  # a row held another text in between
    assert len(read) == 4


def test_prompts_whose_pass_failed_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    session = FakeSession(model, num_rows=2, max_length=CONFIG.window_tokens - 1)
    episodes = Episodes(session, fake_profile(model), fake_windows(3, CONFIG.window_tokens), CONFIG)
    start(episodes, [0, 1])

    def fail(self: FakeSession, *args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(FakeSession, "prefill", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            start(episodes, [1, 2])
        with pytest.raises(RuntimeError, match="out of memory"):
            start(episodes, [0, 1])
    start(episodes, [0, 1])
    assert session.lengths.tolist() == [4, 4]


@pytest.mark.parametrize("source", ["replay", "free"])
def test_kept_prompts_change_no_bit(
    tiny_nested: NestedCausalLM, tiny_profile: Profile, tiny_windows: Tensor, source: Source
) -> None:
    """A second start with the same windows is a first one, whatever was decoded between."""
    config = EnvConfig(prompt_tokens=4, max_new_tokens=STEPS, source=source)

    def new_episodes() -> Episodes:
        session = DecodeSession(tiny_nested, num_rows=ROWS, max_length=config.window_tokens - 1)
        return Episodes(session, tiny_profile, tiny_windows, config)

    again, fresh = new_episodes(), new_episodes()
    start(again, [0, 1, 2], dial=7.0)
    for widths in drawn_widths(tiny_nested.bit_widths, 3, seed=0):
        again.step(Decision(widths))
    for episodes in (again, fresh):
        start(episodes, [0, 1, 2], dial=50.0)
    assert torch.equal(again.signals(), fresh.signals())
    for widths in drawn_widths(tiny_nested.bit_widths, 3, seed=5):
        one, other = again.step(Decision(widths)), fresh.step(Decision(widths))
        assert torch.equal(again.signals(), fresh.signals())
        for name in ("output_kl_nats", "top1_agreement", "latency_ms", "position", "truncated", "kl_weight"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        torch.testing.assert_close(one.token_nll_nats, other.token_nll_nats, rtol=0, atol=0, equal_nan=True)
