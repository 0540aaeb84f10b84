"""The network of a learned policy as an ONNX graph, written node by node and compared through ONNX Runtime.

torch's exporter would take most of a minute and a package more for these twenty nodes, and fix the number of rows.
Needs the extra `onnx`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexquant_rl.engine.control.policy import LearnedPolicy
from flexquant_rl.engine.errors import InputError, first_line

ONNX_FILE = "policy.onnx"
SIGNALS, BIT_WIDTHS, SCORES = "signals", "bit_widths", "scores"
_OPSET, _IR_VERSION = 17, 9  # of ONNX 1.14, which every ONNX Runtime since 1.15 reads
TOLERANCE = 1e-4
"""Largest difference of a score: float32 sums of about a hundred terms, in another order."""


def check_extra() -> None:
    """Raises InputError unless the packages of the extra are there. Worth doing before the work."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'--onnx needs {" and ".join(missing)}; install the extra: pip install "flexquant-rl[onnx]"')


def write_onnx(policy: LearnedPolicy, path: Path) -> None:
    """Writes the graph from `signals [batch, dim]` float32 to `bit_widths [batch, U]` int64 and `scores [batch, U, W]`.

    Its metadata have the model's fingerprint, the signals' schema and the units' names.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    schema = policy.card.schema
    constants, nodes = _graph(policy)
    batch = "batch"
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], name=output, **options) for kind, inputs, output, options in nodes],
        "precision_policy",
        [helper.make_tensor_value_info(SIGNALS, TensorProto.FLOAT, [batch, schema.dim])],
        [
            helper.make_tensor_value_info(BIT_WIDTHS, TensorProto.INT64, [batch, schema.num_units]),
            helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, [batch, schema.num_units, len(schema.bit_widths)]),
        ],
        [numpy_helper.from_array(value.cpu().numpy(), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    helper.set_model_props(
        model,
        {
            "model_fingerprint": policy.card.model_fingerprint,
            "schema": json.dumps(schema.to_dict()),
            "unit_names": json.dumps(policy.card.unit_names),
        },
    )
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def _graph(policy: LearnedPolicy) -> tuple[dict[str, Tensor], list[tuple[str, list[str], str, dict[str, Any]]]]:
    """Constants by name, and nodes as (kind, inputs, output, options): `PrecisionNet.logits`, then the best width."""
    net, schema = policy.net, policy.card.schema
    count = schema.num_global
    constants = {
        "begin": torch.tensor([0]),
        "num_global": torch.tensor([count]),
        "dim": torch.tensor([schema.dim]),
        "features": torch.tensor([1]),
        "per_unit_shape": torch.tensor([-1, schema.num_units, schema.num_per_unit]),
        "all_units": torch.tensor([1, schema.num_units, 1]),
        "global_mean": net.mean[:count],
        "global_std": net.std[:count],
        "unit_mean": net.mean[count:],
        "unit_std": net.std[count:],
        "widths": torch.tensor(schema.bit_widths),
    }
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Slice", [SIGNALS, "begin", "num_global", "features"], "global_signals", {}),
        ("Sub", ["global_signals", "global_mean"], "global_centred", {}),
        ("Div", ["global_centred", "global_std"], "global_normalised", {}),
        ("Slice", [SIGNALS, "num_global", "dim", "features"], "unit_signals", {}),
        ("Reshape", ["unit_signals", "per_unit_shape"], "per_unit", {}),
        ("Sub", ["per_unit", "unit_mean"], "unit_centred", {}),
        ("Div", ["unit_centred", "unit_std"], "unit_normalised", {}),
    ]

    def linear(name: str, layer: nn.Module, source: str) -> str:
        assert isinstance(layer, nn.Linear)
        constants[f"{name}_weight"] = layer.weight.detach().t().contiguous()
        constants[f"{name}_bias"] = layer.bias.detach()
        nodes.append(("MatMul", [source, f"{name}_weight"], f"{name}_product", {}))
        nodes.append(("Add", [f"{name}_product", f"{name}_bias"], f"{name}_sum", {}))
        return f"{name}_sum"

    nodes.append(("Tanh", [linear("context", net.encode_global[0], "global_normalised")], "context", {}))
    nodes.append(("Unsqueeze", ["context", "features"], "context_row", {}))
    nodes.append(("Expand", ["context_row", "all_units"], "context_of_units", {}))
    nodes.append(("Concat", ["unit_normalised", "context_of_units"], "unit_input", {"axis": -1}))
    nodes.append(("Tanh", [linear("first", net.encode_unit[0], "unit_input")], "first", {}))
    nodes.append(("Tanh", [linear("second", net.encode_unit[2], "first")], "second", {}))
    nodes.append(("Identity", [linear("head", net.width_head, "second")], SCORES, {}))
    nodes.append(("ArgMax", [SCORES], "best", {"axis": -1, "keepdims": 0}))
    nodes.append(("Gather", ["widths", "best"], BIT_WIDTHS, {}))
    return constants, nodes


def onnx_facts(path: Path) -> dict[str, Any]:
    """What the metadata of a graph say of it.

    Raises:
        InputError: If it cannot be read, is none of ours, or the extra is missing.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError(f'{path} needs onnxruntime to be read; install the extra: pip install "flexquant-rl[onnx]"')
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        known = session.get_modelmeta().custom_metadata_map
        schema, unit_names = json.loads(known["schema"]), json.loads(known["unit_names"])
        fingerprint = known["model_fingerprint"]
    except Exception as error:  # the runtime raises a dozen types for what it cannot read
        raise InputError(f"{path}: no readable policy ({first_line(error)}); export it again") from error
    return {
        "model_fingerprint": fingerprint,
        "bit_widths": schema.get("bit_widths"),
        "units": unit_names,
        "inputs": {one.name: [str(size) for size in one.shape] for one in session.get_inputs()},
        "outputs": {one.name: [str(size) for size in one.shape] for one in session.get_outputs()},
    }


def check_onnx(path: Path, policy: LearnedPolicy, signals: Tensor) -> None:
    """Compares a graph with the policy that it was written from.

    Args:
        path: What `write_onnx` wrote.
        policy: The policy.
        signals: `[n, dim]` float32.

    Raises:
        RuntimeError: If a score differs by more than `TOLERANCE`, or a width whose score leads by more than that.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run([BIT_WIDTHS, SCORES], {SIGNALS: signals.numpy()})
    bit_widths, scores = (torch.from_numpy(part) for part in found)
    with torch.inference_mode():
        expected = policy.net.logits(signals)
    error = float((scores - expected).abs().max())
    best = expected.topk(min(2, expected.shape[-1]), dim=-1).values
    is_close = (best[..., 0] - best[..., -1] <= TOLERANCE) & (best.shape[-1] > 1)  # rounding may choose either
    differing = int(((bit_widths != policy(signals).bit_widths) & ~is_close).sum())
    if not error <= TOLERANCE or differing:
        raise RuntimeError(
            f"{path}: scores differ by {error:.2g} and {differing} of {bit_widths.numel()} widths from the policy's"
        )
