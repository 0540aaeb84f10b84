"""What Python and the C++ kernels both write down: structs, limits and codes, and the check that they are the same.

The structs here are those of cpp/*.h, field by field. The library lists its own with sizes and offsets
(cpp/mirror.cpp), and `check_library` compares the lists when it is loaded: a field or a number that was changed on
one side only is an error in words, not a wrong token.
"""

from __future__ import annotations

import ctypes
from itertools import count

from flexquant_rl.kernels import signal_constants
from flexquant_rl.kernels.bitplane import INPUT_ALIGNMENT, NUM_PLANES

ABI_VERSION = 2
CACHE_BLOCK = 16
"""Positions whose keys and values are together in the cache."""
WORKSPACE_ALIGNMENT = 64
"""The workspace of a decode step begins at a multiple of as many bytes."""
PADDED_WIDTHS = 16
"""Scores of a unit in the policy network, those beyond its widths included."""
HIDDEN_ALIGNMENT = 16
"""Hidden units of the policy network are a multiple of it."""
MAX_HIDDEN = 256
"""Hidden units of the policy network at most."""
MAX_INPUTS = 64
"""Signals of the token at most, and signals of a unit at most."""

_MAX_LISTED = 3


class LibraryMismatchError(RuntimeError):
    """The native library and the Python files have different structs or constants."""


class WeightStruct(ctypes.Structure):
    """`FqWeight`: one width of a nested weight."""

    _fields_ = (
        ("planes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("plane_stride", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("num_words", ctypes.c_int64),
        ("group_size", ctypes.c_int32),
        ("bit_width", ctypes.c_int32),
        ("scale_factor", ctypes.c_float),
        ("offset_factor", ctypes.c_float),
    )


class LinearStruct(ctypes.Structure):
    """`FqLinear`: one linear at every width."""

    _fields_ = (
        ("widths", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_outputs", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
    )


class LayerStruct(ctypes.Structure):
    """`FqLayer`: one decoder layer."""

    _fields_ = (
        ("query", LinearStruct),
        ("key", LinearStruct),
        ("value", LinearStruct),
        ("output", LinearStruct),
        ("gate", LinearStruct),
        ("up", LinearStruct),
        ("down", LinearStruct),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("attention_unit", ctypes.c_int32),
        ("mlp_unit", ctypes.c_int32),
    )


class DecoderStruct(ctypes.Structure):
    """`FqDecoder`: a model."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("head", LinearStruct),
        ("num_layers", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_key_value_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("max_length", ctypes.c_int64),
        ("cache_length", ctypes.c_int64),
        ("num_units", ctypes.c_int64),
        ("head_unit", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
    )


class PolicyNetStruct(ctypes.Structure):
    """`FqPolicyNet`: a policy network."""

    _fields_ = (
        ("mean", ctypes.c_void_p),
        ("deviation", ctypes.c_void_p),
        ("global_weight", ctypes.c_void_p),
        ("global_bias", ctypes.c_void_p),
        ("context_weight", ctypes.c_void_p),
        ("unit_weight", ctypes.c_void_p),
        ("first_bias", ctypes.c_void_p),
        ("second_weight", ctypes.c_void_p),
        ("second_bias", ctypes.c_void_p),
        ("width_weight", ctypes.c_void_p),
        ("width_bias", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
    )


class ControlStruct(ctypes.Structure):
    """`FqControl`: the signals of one sequence."""

    _fields_ = (
        ("net", ctypes.c_void_p),
        ("bit_widths", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("unit_constants", ctypes.c_void_p),
        ("depth", ctypes.c_void_p),
        ("weight_share", ctypes.c_void_p),
        ("vocab_size", ctypes.c_int64),
        ("num_units", ctypes.c_int64),
        ("num_widths", ctypes.c_int64),
        ("num_embedding_dims", ctypes.c_int64),
        ("horizon", ctypes.c_int64),
        ("signals", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("recent_widths", ctypes.c_void_p),
        ("residual_update", ctypes.c_void_p),
        ("crest", ctypes.c_void_p),
        ("last_widths", ctypes.c_void_p),
        ("entropy", ctypes.c_float),
        ("entropy_ema", ctypes.c_float),
        ("top1", ctypes.c_float),
        ("top2", ctypes.c_float),
        ("surprisal", ctypes.c_float),
        ("step_kl", ctypes.c_float),
        ("dial", ctypes.c_float),
        ("log_partition", ctypes.c_float),
        ("position", ctypes.c_int64),
        ("token_id", ctypes.c_int64),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "FqWeight": WeightStruct,
    "FqLinear": LinearStruct,
    "FqLayer": LayerStruct,
    "FqDecoder": DecoderStruct,
    "FqPolicyNet": PolicyNetStruct,
    "FqControl": ControlStruct,
}
"""The name of each struct in the headers."""


def check_library(library: ctypes.CDLL, codes: dict[str, int]) -> None:
    """Compares every struct and constant of the library with those of the Python files.

    Args:
        library: The library.
        codes: Codes and limits that the caller passes to the library, by their names in the headers.

    Raises:
        LibraryMismatchError: If one is missing on either side or differs.
    """
    try:
        theirs = mirrored(library)
    except AttributeError as error:
        raise LibraryMismatchError(f"{library._name} is no library of this version ({error}); delete it") from error
    ours = {**expected_constants(), **codes, **expected_layouts()}
    differences = [
        f"{name} is {theirs.get(name, 'missing')} in C++ and {ours.get(name, 'missing')} in Python"
        for name in (*theirs, *(name for name in ours if name not in theirs))
        if name not in theirs or name not in ours or _single(theirs[name]) != _single(ours[name])
    ]
    if differences:
        more = f" and {len(differences) - _MAX_LISTED} more" if len(differences) > _MAX_LISTED else ""
        raise LibraryMismatchError(
            f"{library._name} and kernels/*.py disagree: {'; '.join(differences[:_MAX_LISTED])}{more}. Change both "
            "sides, or reinstall the package if you have changed neither"
        )


def mirrored(library: ctypes.CDLL) -> dict[str, float]:
    """What the library says about its structs and constants, by name.

    Raises:
        AttributeError: If it is of a version that says nothing.
    """
    library.fq_mirror_name.argtypes = library.fq_mirror_value.argtypes = (ctypes.c_int32,)
    library.fq_mirror_name.restype, library.fq_mirror_value.restype = ctypes.c_char_p, ctypes.c_double
    values: dict[str, float] = {}
    for index in count():
        name: bytes | None = library.fq_mirror_name(index)
        if name is None:
            break
        values[name.decode()] = library.fq_mirror_value(index)
    return values


def expected_constants() -> dict[str, float]:
    """The constants that the library must have, by their names in the headers."""
    return {
        "kAbiVersion": ABI_VERSION,
        "kNumPlanes": NUM_PLANES,
        "kInputAlignment": INPUT_ALIGNMENT,
        "kCacheBlock": CACHE_BLOCK,
        "kWorkspaceAlignment": WORKSPACE_ALIGNMENT,
        "kPaddedWidths": PADDED_WIDTHS,
        "kHiddenAlignment": HIDDEN_ALIGNMENT,
        "kMaxHidden": MAX_HIDDEN,
        "kMaxInputs": MAX_INPUTS,
        "kSignalSchemaVersion": signal_constants.SIGNAL_SCHEMA_VERSION,
        "kRecentTokens": signal_constants.RECENT_TOKENS,
        "kNumTokenSignals": signal_constants.NUM_TOKEN_SIGNALS,
        "kNumStepSignals": signal_constants.NUM_STEP_SIGNALS,
        "kEmaDecay": signal_constants.EMA_DECAY,
        "kLogProbabilityFloor": signal_constants.LOG_PROBABILITY_FLOOR,
        "kKlFloorNats": signal_constants.KL_FLOOR_NATS,
        "kStatisticFloor": signal_constants.STATISTIC_FLOOR,
        "kNormFloor": signal_constants.NORM_FLOOR,
        "kSignalLimit": signal_constants.SIGNAL_LIMIT,
        "kNatsScale": signal_constants.NATS_SCALE,
        "kDecadesScale": signal_constants.DECADES_SCALE,
        "kWidthScale": signal_constants.WIDTH_SCALE,
        "kPositionScale": signal_constants.POSITION_SCALE,
    }


def expected_layouts() -> dict[str, int]:
    """Size of every struct, and offset, size and kind of its fields, as the library names them."""
    layouts = {}
    for name, struct in STRUCTS.items():
        layouts[f"{name} size"] = ctypes.sizeof(struct)
        for field, kind, *_ in struct._fields_:
            place = getattr(struct, field)
            layouts[f"{name}.{field} offset"] = place.offset
            layouts[f"{name}.{field} size"] = place.size
            layouts[f"{name}.{field} kind"] = _kind(kind)
    return layouts


def _kind(kind: type) -> int:
    """The codes of cpp/mirror.cpp: integer, float, pointer, struct."""
    if issubclass(kind, ctypes.Structure):
        return 3
    return {ctypes.c_int32: 0, ctypes.c_int64: 0, ctypes.c_float: 1, ctypes.c_void_p: 2}[kind]


def _single(value: float) -> float:
    """As float32, in which the library has its constants."""
    return ctypes.c_float(value).value
