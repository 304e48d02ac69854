"""The folded model as an ONNX graph, and its channel MLPs in int8, with standard operators only.

Every token is scaled by its own largest value while the model runs: nothing is calibrated, and
neither another image of the batch nor an unusual image can spoil a result. The int8 products stand
between QuantizeLinear and DequantizeLinear, which onnxruntime fuses and any reader of ONNX
understands. Patches, token mixing and head stay in float32: together they are less than a tenth of
the operations.

onnxruntime's own `quantize_dynamic`, which scales a whole batch at once, took 0.8 to 0.9 of the
time, with three times the error: 99.6 to 99.7 % of the top-1 classes of four models trained on
small images (this: 99.85 %), and 39 of 40 of a tiny model's.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cli.errors import UserError
from tools.infer_exported import notes_to_stderr

OPSET = 17
# Weights have 7 bits: where a processor adds pairs of 8-bit products in 16 bits (AVX2 without
# VNNI), 2 x 255 x 64 fits, and 2 x 255 x 127 would be cut off.
WEIGHT_LEVELS = 64
GELU_MINIMUM = 0.17  # GELU is never below -0.17


def convert(source: Path) -> onnx.ModelProto:
    """A model that ``paddle.jit.save`` wrote (``.json`` or ``.pdmodel``) as a tidy ONNX model.

    Raises:
        UserError: paddle2onnx failed.
    """
    file = str(source.with_suffix(".onnx"))
    try:
        import paddle2onnx

        options = {"opset_version": OPSET, "verbose": False}
        if "optimize_tool" in inspect.signature(paddle2onnx.export).parameters:
            options["optimize_tool"] = "None"  # the default installs packages while it runs
        with notes_to_stderr(), contextlib.redirect_stdout(sys.stderr):
            paddle2onnx.export(str(source), str(source.with_suffix(".pdiparams")), file, **options)
    except Exception as error:  # its version must match Paddle's, and shows that in many ways
        raise UserError(
            f"ONNX: paddle2onnx failed ({type(error).__name__}: {error}); Paddle 3 takes "
            "paddle2onnx 2.1, Paddle 2.6 takes 1.3"
        ) from error
    model = onnx.load(file)
    tidy(model.graph)
    return model


def tidy(graph: onnx.GraphProto) -> None:
    """Turns constants into initializers, as quantizers and other readers expect weights to be.

    paddle2onnx writes each weight as a Constant node, some with an Identity node behind it, and
    constants that nothing uses.
    """
    outputs = {output.name for output in graph.output}
    source, nodes = {}, []
    for node in graph.node:
        node.input[:] = [source.get(name, name) for name in node.input]
        name = node.output[0]
        if node.op_type == "Identity" and name not in outputs:
            source[name] = node.input[0]
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            graph.initializer.add().CopyFrom(node.attribute[0].t)
            graph.initializer[-1].name = name
        else:
            nodes.append(node)
    _replace(graph.node, nodes)
    used = {name for node in nodes for name in node.input}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def quantize(graph: onnx.GraphProto, depth: int) -> int:
    """Puts the two products of every block's MLP into int8.

    Args:
        graph: a folded ResMLP, see `tidy`; changed in place.
        depth: its blocks.

    Returns:
        The number of layers that are int8 now.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    products = products[: 2 * depth]  # fc1, fc2, fc1 ...; the head may be one more
    assert len(products) == 2 * depth, f"{len(products)} MLP products in {depth} blocks"
    instead = {}
    for number, node in enumerate(products):
        weight = numpy_helper.to_array(weights.pop(node.input[1]))
        after_gelu = number % 2 == 1
        instead[node.output[0]], tensors = _int8_product(node, weight, after_gelu)
        weights.update((tensor.name, tensor) for tensor in tensors)
        if not after_gelu:
            _keep_bias_apart(graph, node.output[0], weights)
    nodes = [new for node in graph.node for new in instead.get(node.output[0], [node])]
    _replace(graph.node, nodes)
    _replace(graph.initializer, list(weights.values()))
    return len(products)


def _int8_product(node, weight: np.ndarray, after_gelu: bool) -> tuple[list, list]:
    """Nodes and initializers of x W: x ``[B, N, in]`` with a scale a token, W with one a column."""
    x, y = node.input[0], node.output[0]
    weight_scale = np.maximum(np.abs(weight).max(0), 1e-30) / WEIGHT_LEVELS  # [out]
    if after_gelu:  # x / largest is in [-1/4, 1], if largest is at least 4 * 0.17
        floor, scale, zero = 4 * GELU_MINIMUM, 1 / 204, 51  # 1.25 / 255
    else:  # in [-1, 1]
        floor, scale, zero = 1e-12, 1 / 127, 128
    tensors = {
        "floor": np.float32(floor),
        "scale": np.float32(scale),
        "zero": np.uint8(zero),
        "weight": np.rint(weight / weight_scale).astype(np.int8),
        "weight_scale": weight_scale.astype(np.float32),
        "weight_zero": np.zeros(len(weight_scale), np.int8),
    }

    def op(kind: str, inputs: str, output: str, **attributes):
        # a name that is no tensor's stands for a value of this product
        names = [name if name in (x, y) else f"{y}.{name}" for name in [*inputs.split(), output]]
        return helper.make_node(kind, names[:-1], names[-1:], name=names[-1], **attributes)

    nodes = [] if after_gelu else [op("Abs", x, "magnitude")]
    nodes += [
        op("ReduceMax", x if after_gelu else "magnitude", "row_max", axes=[-1], keepdims=1),
        op("Max", "row_max floor", "largest"),
        op("Div", f"{x} largest", "scaled"),
        op("QuantizeLinear", "scaled scale zero", "bytes"),
        op("DequantizeLinear", "bytes scale zero", "rounded"),
        op("DequantizeLinear", "weight weight_scale weight_zero", "rounded_weight", axis=1),
        op("MatMul", "rounded rounded_weight", "product"),
        op("Mul", "product largest", y),
    ]
    return nodes, [numpy_helper.from_array(np.asarray(a), f"{y}.{k}") for k, a in tensors.items()]


def _keep_bias_apart(graph, product: str, weights: dict) -> None:
    """Makes fc1's bias ``[H]`` a ``[1, 1, H]``, which means the same: onnxruntime 1.32 would join
    a vector with the GELU after it, in a kernel slower than its two (a tenth of the model's time).
    """
    (add,) = (node for node in graph.node if product in node.input)
    (bias,) = (weights[name] for name in add.input if name != product)
    bias.dims[:] = [1, 1, *bias.dims]


def _replace(field, values: list) -> None:
    values = list(values)
    del field[:]
    field.extend(values)
