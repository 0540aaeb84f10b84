"""A policy inside Hugging Face's `generate`: the widths of every token are chosen while its ordinary loop runs.

`generate` calls the model once for the prompt and once for every token. An attached policy wraps that call: the prompt
is read at the largest width, every later token at the widths that the policy decides from what the calls before put
out, as `PolicyRunner` does. Calls outside `generate` read the largest width. What is under way travels in a
`ContextVar`, so that generations in several threads do not meet.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from flexquant_rl.engine.control.artefact import PROFILE_FILE, load_policy, policy_directory
from flexquant_rl.engine.control.controller import Controller, make_controller
from flexquant_rl.engine.control.decision import Policy, looks
from flexquant_rl.engine.control.dial import check_kl_weight
from flexquant_rl.engine.control.drafts import DraftPolicy
from flexquant_rl.engine.control.profile import Profile
from flexquant_rl.engine.control.token_policy import DialPolicy
from flexquant_rl.engine.decoding.decoder import ExtendOutput, StepOutput
from flexquant_rl.engine.errors import InputError
from flexquant_rl.engine.huggingface.quantizer import nested_model
from flexquant_rl.engine.linear import reading
from flexquant_rl.engine.model import NestedCausalLM
from flexquant_rl.engine.serving import check_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODES = ("greedy_search", "sample")
_UNSERVED = ("assistant_model", "negative_prompt_ids", "custom_generate")
"""Arguments of `generate` that call the model in ways of their own."""


class _Replacement:
    """Stands in for a method of a model and, to those who look at its signature, like it."""

    def __init__(self, method: Callable[..., Any], call: Callable[..., Any]) -> None:
        self.__signature__ = inspect.signature(method)
        self._call = call

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._call(*args, **options)


class AttachedPolicy:
    """A policy at work inside a model's `generate`.

    Attributes:
        policy: The policy.
        kl_weight: The dial; a new value holds from the next call of `generate` on.
        bit_widths: What the call of `generate` that began last has chosen: `[R, U]` int64 for each token after the
            first one, which comes from the prompt.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy, profile: Profile | None, nested: NestedCausalLM, kl_weight: float
    ) -> None:
        self.policy = policy
        self.kl_weight = kl_weight
        self.bit_widths: list[Tensor] = []
        self._profile = profile
        self._model = cast(Any, model)  # `nn.Module` has no type for what is set on it
        self._nested = nested
        self._replaced = {name: vars(model).get(name) for name in ("forward", "generate")}
        self._forward: Callable[..., Any] = self._model.forward
        self._generate: Callable[..., Any] = self._model.generate
        self._model.forward = _Replacement(self._forward, self._call)
        self._model.generate = _Replacement(self._generate, self._continue)

    @property
    def mean_bit_width(self) -> float:
        """Parameter-weighted mean of `bit_widths`, in bits; NaN where no token was generated after the first."""
        if not self.bit_widths:
            return math.nan
        return float(self._nested.mean_bit_width(torch.cat(self.bit_widths)).mean())

    def detach(self) -> None:
        """Gives the model its own `forward` and `generate` back. Detaching twice is fine."""
        if getattr(self._model, "attached_policy", None) is not self:
            return
        for name, before in self._replaced.items():
            if before is None:
                delattr(self._model, name)
            else:
                setattr(self._model, name, before)
        del self._model.attached_policy

    def _continue(self, *args: Any, **options: Any) -> Any:
        """`generate`, refused in one line where its loop is not one token of each row at a time."""
        bound = inspect.signature(self._generate).bind_partial(*args, **options).arguments
        given = {**bound, **bound.get("kwargs", {})}
        self._check({name: value for name, value in given.items() if name != "kwargs"})
        check_kl_weight(self.kl_weight)
        sequence = _Sequence(self, self._nested, self._profile)
        self.bit_widths = sequence.bit_widths
        token = _UNDER_WAY.set(sequence)
        try:
            return self._generate(*args, **options)
        finally:
            _UNDER_WAY.reset(token)

    def _check(self, given: dict[str, Any]) -> None:
        for name in _UNSERVED:
            if given.pop(name, None) is not None:
                raise InputError(f"{name} cannot be used with an attached policy; leave it out, or detach the policy")
        config, _ = self._model._prepare_generation_config(given.pop("generation_config", None), **given)
        mode = config.get_generation_mode()
        if mode not in _MODES:
            raise InputError(
                f"{mode.value.replace('_', ' ')} cannot be served by an attached policy, which reads one token of each "
                "row at a time; use greedy search or sampling, or detach the policy"
            )
        rules = {
            "use_cache=False": config.use_cache is False,
            "cache_implementation='paged'": config.cache_implementation == "paged",
            "prefill_chunk_size": config.prefill_chunk_size is not None,
            "guidance_scale": config.guidance_scale not in (None, 1),
        }
        for name, is_set in rules.items():
            if is_set:
                raise InputError(f"{name} cannot be used with an attached policy; leave it out, or detach the policy")

    def _call(self, *args: Any, **options: Any) -> Any:
        """`forward`, at the widths that the policy decides where its `generate` is under way."""
        sequence = _UNDER_WAY.get()
        if sequence is None or sequence.attached is not self:
            return self._forward(*args, **options)
        return sequence.call(self._forward, args, options)


class _Sequence:
    """One call of `generate`: R rows, from their prompts on."""

    def __init__(self, attached: AttachedPolicy, nested: NestedCausalLM, profile: Profile | None) -> None:
        self.attached = attached
        self.bit_widths: list[Tensor] = []
        self._nested = nested
        self._profile = profile
        self._kl_weight = attached.kl_weight
        self._controller: Controller | None = None
        self._output: StepOutput | None = None

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Runs one call of the model: the prompt first, then a token of every row."""
        nested = self._nested
        if self._output is None:
            _check_padding(options.get("attention_mask"))
            widths = torch.full((1, 1, nested.num_units), max(nested.bit_widths))
        else:
            widths = self._decide(options.get("input_ids"), self._output)[:, None]
        plan = nested.width_plan(widths, keep=1, collect=1)
        with reading(plan):
            result = forward(*args, **options)
        self._output = ExtendOutput.of_pass(nested, nested.result_of(plan, result.logits[:, -1:].float())).at(0)
        return result

    def _decide(self, token_ids: Tensor | None, output: StepOutput) -> Tensor:
        """Widths `[R, U]` of the tokens `[R, 1]` that are read next, after what the last call put out."""
        num_rows = len(output.logits)
        if token_ids is None or token_ids.shape != (num_rows, 1):
            shape = None if token_ids is None else list(token_ids.shape)
            raise InputError(
                f"the model was called with tokens {shape} where an attached policy reads one of each of {num_rows} "
                "rows; use greedy search or sampling with a cache, or detach the policy"
            )
        upcoming = token_ids[:, 0].cpu()
        if self._controller is None:
            policy = self.attached.policy
            self._controller = make_controller(self._nested, policy, self._profile, num_rows=num_rows)
            self._controller.reset(output, upcoming, torch.full((num_rows,), self._kl_weight, dtype=torch.float32))
        else:
            self._controller.update(output, self.bit_widths[-1], upcoming)
        self.bit_widths.append(self._controller.decide().bit_widths)
        return self.bit_widths[-1]


_UNDER_WAY: ContextVar[_Sequence | None] = ContextVar("flexquant_rl_generation", default=None)


def _check_padding(mask: Any) -> None:
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
        raise InputError(
            "a prompt ends in padding, so the policy would see the padding's output; set padding_side='left' in the "
            "tokenizer"
        )


def attach_policy(
    model: PreTrainedModel,
    policy: Policy | Path | str,
    *,
    profile: Profile | None = None,
    kl_weight: float | None = None,
    speed: float | None = None,
) -> AttachedPolicy:
    """Has a policy choose the widths of every token inside a model's ordinary `generate` and in pipelines.

    Args:
        model: A nested model that transformers loaded. A policy that it has already is replaced.
        policy: The policy, or the directory of an exported one or of a finished run.
        profile: The profile that the policy was trained with; default: the one in its directory. A static allocation
            needs none.
        kl_weight: The dial; default: the middle setting of the policy's table, 1 for a policy without one.
        speed: Modelled speedup to aim for, instead of the dial.

    Returns:
        The attached policy, which can be detached, and knows the widths that were chosen.

    Raises:
        InputError: If the model is not nested, if the policy is missing, damaged, of another model or one that drafts,
            or if dial, speed or profile do not go with it.
    """
    nested = nested_model(model)
    found: Policy | DraftPolicy
    if isinstance(policy, str | Path):
        directory = policy_directory(Path(policy))
        if not directory.is_dir():
            raise InputError(
                f"{policy} is no directory of a run or an exported policy; make one with `fq export`, or pass a "
                "StaticAllocation"
            )
        found = load_policy(directory, model_fingerprint=nested.fingerprint)
        profile = profile or Profile.load(directory / PROFILE_FILE)
    else:
        found = policy
    if isinstance(found, DraftPolicy):
        raise InputError(
            f"policy {found.name!r} drafts, which takes passes that `generate` does not make; use flexquant_rl.generate"
        )
    check_policy(found, nested)
    if profile is None and looks(found):
        raise InputError(f"policy {found.name!r} sees the model's profile; pass the one it was trained with")
    if profile is not None and profile.fingerprint != nested.fingerprint:
        raise InputError(
            f"the profile is of model {profile.fingerprint[:12]}, but this one is {nested.fingerprint[:12]}; run "
            "`fq profile` on this model"
        )
    dial = _kl_weight(found, kl_weight, speed)
    before = getattr(model, "attached_policy", None)
    if before is not None:
        before.detach()
    attached = AttachedPolicy(model, found, profile, nested, dial)
    model.attached_policy = attached  # type: ignore[assignment]
    return attached


def _kl_weight(policy: Policy, kl_weight: float | None, speed: float | None) -> float:
    """The dial as given, for the speed asked for, or where nobody asks."""
    for name, value in (("speed", speed), ("kl_weight", kl_weight)):
        if value is not None and not isinstance(value, int | float):
            raise InputError(f"{name}={value!r} must be a number; give e.g. 1.5")
        has_one = isinstance(policy, DialPolicy) or (name == "kl_weight" and looks(policy))
        if value is not None and not has_one:
            raise InputError(f"{name}={value:g} sets a dial, and {policy.name} has none; leave it out")
    if kl_weight is not None and speed is not None:
        raise InputError(f"speed={speed:g} and kl_weight={kl_weight:g} set the same dial; give one of them")
    if kl_weight is not None:
        check_kl_weight(kl_weight)
        return kl_weight
    if not isinstance(policy, DialPolicy):
        return 1.0
    return (policy.card.middle_setting() if speed is None else policy.card.setting_for_speed(speed)).kl_weight
