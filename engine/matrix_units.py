"""A model cut down to its single matrices, for questions that are finer than units: which kind of matrix is sensitive.

A kind is what a matrix is called in its layer, without `_proj`: q, k, v, o, gate, up and down in a Llama; as much of
its path as tells it from the others of its layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexquant_rl.engine.model import NestedCausalLM, Unit

HEAD = "head"
"""The kind of the output head."""


def matrix_units(model: NestedCausalLM) -> tuple[Unit, ...]:
    """One unit for each nested matrix, in the order of the model's units, for `NestedCausalLM.cut_into`.

    They are called `layer.3.q`, and the head `head`.
    """
    linears = model.nested_linears()
    found = []
    for layer_idx in range(model.num_layers):
        names = [name for unit in model.units if unit.layer_idx == layer_idx for name in unit.linears]
        for name, kind in zip(names, _short_names(names), strict=True):
            weight = linears[name].weight
            num_weights = weight.num_outputs * weight.num_inputs
            found.append(Unit(f"layer.{layer_idx}.{kind}", "matrix", layer_idx, (name,), num_weights))
    return (*found, *(unit for unit in model.units if unit.kind == "head"))


def matrix_kind(unit: Unit) -> str:
    """What kind of matrix a unit of `matrix_units` is."""
    return HEAD if unit.kind == "head" else unit.name.split(".", 2)[2]


def kinds_of(units: Sequence[Unit]) -> dict[str, list[int]]:
    """The indices of the units of each kind, kinds in the order of a layer, the head last."""
    found: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        found.setdefault(matrix_kind(unit), []).append(index)
    return found


def _short_names(paths: Sequence[str]) -> list[str]:
    """As much of the end of each path as no other one shares."""
    parts = [path.split(".") for path in paths]

    def shortest(own: list[str]) -> str:
        for length in range(1, len(own) + 1):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                return ".".join(own[-length:])
        return ".".join(own)

    names = [shortest(own) for own in parts]
    return [name if "." in name else name.removesuffix("_proj") for name in names]
