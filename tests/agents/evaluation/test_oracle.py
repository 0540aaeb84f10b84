"""The oracle finds the tokens whose widths matter most, and what it reports has really been run."""

from __future__ import annotations

import itertools

import pytest
import torch
from fake_session import FakeModel, FakeSession, fake_windows
from torch import Tensor

from flexquant_rl.agents.evaluation import oracle
from flexquant_rl.agents.evaluation.evaluate import Evaluator
from flexquant_rl.agents.evaluation.oracle import OracleConfig, _best_mask, _MaskScorer, token_oracle
from flexquant_rl.agents.preparation import Prepared
from flexquant_rl.engine.control.decision import Decision
from flexquant_rl.engine.control.output_kl import output_kl_nats, reference_width
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.fq_env.config import EnvConfig


class SyntheticScorer:
    """Each token's high widths save a known KL; optionally noise and what two neighbours save together."""

    def __init__(self, num_tokens: int, *, noise: float = 0.0, pairs: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens = num_tokens
        self.saved = torch.rand(num_tokens, generator=generator, dtype=torch.float64).pow(2)
        self._noise, self._pairs, self._generator = noise, pairs, generator
        self.masks_seen = 0

    def sequence_kl(self, masks: Tensor) -> Tensor:
        self.masks_seen += len(masks)
        high = masks.double()
        kl = 5 - high @ self.saved - self._pairs * (high[:, 1:] * high[:, :-1]).sum(1)
        return kl + self._noise * torch.randn(len(masks), generator=self._generator, dtype=torch.float64)

    def best(self, num_high: int) -> set[int]:
        return set(self.saved.argsort(descending=True)[:num_high].tolist())


def found(scorer: SyntheticScorer, config: OracleConfig, seed: int = 0) -> set[int]:
    mask = _best_mask(scorer, config, seed=seed)  # type: ignore[arg-type]
    assert mask.dtype == torch.bool
    assert mask.shape == (scorer.num_tokens,)
    return set(mask.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("seed", range(3))
def test_known_influences_are_found(seed: int) -> None:
    scorer = SyntheticScorer(16, seed=seed)
    assert found(scorer, OracleConfig(num_masks=400), seed) == scorer.best(8)
    assert scorer.masks_seen == 400


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_share_of_high_tokens(share: float) -> None:
    scorer = SyntheticScorer(16)
    picked = found(scorer, OracleConfig(num_masks=400, share_high=share))
    best = scorer.best(round(16 * share))
    assert len(picked) == len(best)
    # Two tokens at the border may save as good as the same.
    assert float(scorer.saved[list(picked)].sum()) > 0.99 * float(scorer.saved[list(best)].sum())


@pytest.mark.parametrize("num_tokens", [15, 64])
def test_most_of_the_best_is_found_from_few_noisy_masks(num_tokens: int) -> None:
    """64 tokens from 48 pairs of masks, fewer than unknowns: most of what the best half saves, far more than chance."""
    for seed in range(3):
        scorer = SyntheticScorer(num_tokens, noise=0.05, pairs=0.02, seed=seed)
        picked = list(found(scorer, OracleConfig(), seed))
        best = sum(scorer.saved[index] for index in scorer.best(len(picked)))
        saved, by_chance = scorer.saved[picked].sum(), scorer.saved.sum() * len(picked) / num_tokens
        assert float((saved - by_chance) / (best - by_chance)) > 0.5


def test_equal_seeds_choose_alike() -> None:
    scorers = [SyntheticScorer(12, noise=0.1) for _ in range(3)]
    a, b = (found(scorer, OracleConfig(num_masks=10), seed=1) for scorer in scorers[:2])
    assert a == b


LOW, HIGH = torch.tensor([3, 3, 3, 3]), torch.tensor([5, 5, 5, 5])
ENV = EnvConfig(prompt_tokens=3, max_new_tokens=8)


@pytest.mark.parametrize("carry", [0.0, 0.8])
def test_later_costs_count(carry: float) -> None:
    """On the fake model KL is a sum over tokens, each weighted by what its keys and values cost later ones."""
    model = FakeModel(carry=carry)
    window = fake_windows(1, ENV.window_tokens, seed=2)[0]
    scorer = _MaskScorer(FakeSession(model), window, LOW, HIGH, ENV)  # type: ignore[arg-type]
    masks = torch.tensor(list(itertools.product([False, True], repeat=8)))
    halves = masks[masks.sum(1) == 4]
    picked = _best_mask(scorer, OracleConfig(num_masks=200), seed=0)
    assert int(picked.sum()) == 4
    all_kl = scorer.sequence_kl(halves)
    reached = float(scorer.sequence_kl(picked[None]))
    assert reached <= float(all_kl.min()) * 1.001  # of all 70 halves; tokens of one class tie
    assert reached < 0.9 * float(all_kl.mean())
    if carry:  # a token at the end is cheap however much its own output suffers
        tokens = window[3:11]
        own = model.own_kl_nats(tokens, LOW.expand(8, -1)) - model.own_kl_nats(tokens, HIGH.expand(8, -1))
        myopic = set(own.argsort(descending=True)[:4].tolist())
        assert set(picked.nonzero()[:, 0].tolist()) != myopic


def test_scorer_reads_prompts_at_full_width() -> None:
    model = FakeModel()
    window = fake_windows(1, ENV.window_tokens)[0]
    scorer = _MaskScorer(FakeSession(model), window, LOW, HIGH, ENV)  # type: ignore[arg-type]
    widths = scorer.widths(torch.tensor([[True, False] * 4]))
    assert widths.shape == (1, 11, 4)
    assert (widths[0, :3] == 8).all()
    assert widths[0, 3:, 0].tolist() == [5, 3] * 4
    own = model.own_kl_nats(window[3:11], widths[0, 3:]).mean()
    assert float(scorer.sequence_kl(torch.tensor([[True, False] * 4]))) == pytest.approx(float(own), rel=1e-3)


def test_kl_of_choices_is_that_of_the_definition_however_many_go_in_a_pass(
    tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = DecodeSession(tiny_prepared.model)
    window, first = tiny_prepared.windows.test[0], tiny_prepared.env.prompt_tokens
    scorer = _MaskScorer(session, window, torch.tensor([3, 3, 3]), torch.tensor([5, 5, 5]), tiny_prepared.env)
    masks = torch.rand(7, scorer.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    reference = session.score(window[None, :-1], torch.full((3,), reference_width(tiny_prepared.model)), first=first)
    wanted = output_kl_nats(reference, scorer.logits(masks)).mean(1).double()
    torch.testing.assert_close(scorer.sequence_kl(masks), wanted, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(oracle, "LOGITS_AT_A_TIME", 2 * reference.numel())
    torch.testing.assert_close(scorer.sequence_kl(masks), wanted, rtol=1e-3, atol=1e-6)


def test_beats_random_halves_on_a_model(tiny_prepared: Prepared) -> None:
    low, high = torch.tensor([3, 3, 3]), torch.tensor([5, 5, 5])
    windows = tiny_prepared.windows.test[:4]
    trace = token_oracle(
        tiny_prepared.model, tiny_prepared.profile, windows, low, high, tiny_prepared.env, OracleConfig(num_masks=64)
    )
    assert trace.output_kl_nats.shape == (4, 12)
    is_high = trace.bit_widths == high
    assert (is_high.all(-1) | (~is_high).all(-1)).all()  # whole tokens
    assert is_high[..., 0].sum(1).tolist() == [6] * 4
    evaluator = Evaluator(tiny_prepared.model, tiny_prepared.profile, windows, tiny_prepared.env)

    class Recorded:
        name = "recorded"

        def __init__(self, widths: Tensor) -> None:
            self._steps = iter(widths.unbind(1))

        def __call__(self, signals: Tensor) -> Decision:
            return Decision(next(self._steps))

    generator = torch.Generator().manual_seed(0)
    by_chance = []
    for _ in range(8):
        masks = torch.rand(4, 12, generator=generator).argsort(1) < 6
        run = evaluator.run(Recorded(torch.where(masks[..., None], high, low)))
        by_chance.append(float(run.output_kl_nats.mean()))
        assert run.speedup == pytest.approx(trace.speedup)  # the same cost
    assert float(trace.output_kl_nats.mean()) < min(by_chance)
    # What the oracle reports is what those widths give when they are decoded step by step.
    real = evaluator.run(Recorded(trace.bit_widths))
    torch.testing.assert_close(real.output_kl_nats, trace.output_kl_nats, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(real.token_nll_nats, trace.token_nll_nats, atol=2e-4, rtol=1e-4)
    assert torch.equal(real.top1_agreement, trace.top1_agreement)
    torch.testing.assert_close(real.latency_ms.double(), trace.latency_ms.double())
    torch.testing.assert_close(real.mean_bit_width, trace.mean_bit_width)
