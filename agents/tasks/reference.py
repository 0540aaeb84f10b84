"""Full precision as tasks see it: the unquantised weights of a model, asked as an `Engine` is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from flexquant_rl.engine.control.controller import StaticController
from flexquant_rl.engine.control.decision import StaticAllocation
from flexquant_rl.engine.control.request import GeneratedToken, Request
from flexquant_rl.engine.control.runner import Likelihood, PolicyRunner, check_pairs
from flexquant_rl.engine.decoding.decoder import StepOutput
from flexquant_rl.engine.decoding.session import DecodeSession
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.linear import REFERENCE_WIDTH
from flexquant_rl.engine.model import NestedCausalLM

FULL_PRECISION = "full"
"""What names the unquantised model among policies."""


class ReferenceSession(DecodeSession):
    """A session that reads prompts at the unquantised weights too."""

    def prefill(
        self, prompt_ids: Tensor, *, rows: Tensor | None = None, bit_widths: Tensor | None = None
    ) -> StepOutput:
        """See `Decoder.prefill`; without widths the prompt is read unquantised."""
        unquantised = torch.full((self.model.num_units,), REFERENCE_WIDTH)
        return super().prefill(prompt_ids, rows=rows, bit_widths=unquantised if bit_widths is None else bit_widths)


class ReferenceEngine:
    """Generates and scores with unquantised weights, float32, in Hugging Face's modules.

    Args:
        model: Keeps its reference.

    Raises:
        InputError: If it keeps none, as a nested checkpoint.
    """

    def __init__(self, model: NestedCausalLM) -> None:
        if not model.has_reference:
            raise InputError(
                f"policy {FULL_PRECISION!r} reads unquantised weights, and a nested checkpoint has none; name the "
                "model that it was made from with --reference DIR"
            )
        self.model = model

    def generate(self, request: Request) -> Iterator[GeneratedToken]:
        """Continues a prompt, as `Engine.generate`."""
        request.check(self.model.max_context, self.model.vocab_size)
        widths = torch.full((self.model.num_units,), REFERENCE_WIDTH)
        session = ReferenceSession(self.model, max_length=request.num_held)
        runner = PolicyRunner(session, StaticController(StaticAllocation(FULL_PRECISION, widths)))
        with closing(runner.decoder):
            yield from runner.generate([request], self.model.token_text)

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, kl_weight: float, num_rows: int = 8
    ) -> list[Likelihood]:
        """Scores pairs as `Engine.loglikelihood`; where nothing switches one pass is enough."""
        check_pairs(pairs, kl_weight, self.model.max_context, self.model.vocab_size)
        session = DecodeSession(self.model, max_length=1)
        found = []
        with closing(session):
            for context, continuation in pairs:
                ids = torch.tensor([[*context, *continuation]])
                log_probs = session.score(ids[:, :-1], first=len(context) - 1)[0].log_softmax(-1).cpu()
                wanted = ids[0, len(context) :]
                nats = log_probs.gather(1, wanted[:, None]).double().sum()
                found.append(Likelihood(float(nats), bool((log_probs.argmax(-1) == wanted).all())))
        return found

    def close(self) -> None:
        """Nothing is kept between calls."""
