"""The folded model as an ONNX graph, and its channel MLPs in int8, with standard operators only."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from pathlib import Path

import onnx

from cli.errors import UserError
from tools.infer_exported import notes_to_stderr

OPSET = 17


def write_onnx(source: Path, file: Path, int8: bool = False) -> int:
    """Writes what ``paddle.jit.save`` wrote as a tidy ONNX model; returns its layers in int8.
    UserError if paddle2onnx fails.
    """
    try:
        import paddle2onnx

        options = {"opset_version": OPSET, "verbose": False}
        if "optimize_tool" in inspect.signature(paddle2onnx.export).parameters:
            options["optimize_tool"] = "None"  # the default installs packages while it runs
        weights = source.with_suffix(".pdiparams")
        with notes_to_stderr(), contextlib.redirect_stdout(sys.stderr):
            paddle2onnx.export(str(source), str(weights), str(file), **options)
    except Exception as error:  # its version must match Paddle's, and shows that in many ways
        raise UserError(
            f"ONNX: paddle2onnx failed ({type(error).__name__}: {error}); Paddle 3 takes "
            "paddle2onnx 2.1, Paddle 2.6 takes 1.3"
        ) from error
    model = onnx.load(file)
    _tidy(model.graph)
    if int8:
        return _quantize(model, file)
    onnx.save(model, file)
    return 0


def _tidy(graph: onnx.GraphProto) -> None:
    """Turns constants into initializers, where quantizers and other readers expect weights.

    paddle2onnx writes a Constant node per weight, some with an Identity, and unused constants.
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
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)


def _quantize(model: onnx.ModelProto, file: Path) -> int:
    """Writes a model with both products of every block's MLP in int8; returns how many there are.

    By onnxruntime's dynamic quantization: nothing is calibrated. Patches, token mixing and head,
    less than a tenth of the operations, stay in float32. Weights have 7 bits (`reduce_range`):
    where a processor adds pairs of products in 16 bits (AVX2 without VNNI), 8 would overflow.
    """
    from onnxruntime.quantization import quantize_dynamic

    weights = {tensor.name for tensor in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    products = products[: len(products) // 2 * 2]  # fc1, fc2, fc1 ...; the head is one more
    for node in model.graph.node:
        node.name = node.output[0]
    logging.disable(logging.WARNING)  # advice for whoever calls it by hand
    try:
        names = [node.name for node in products]
        options = dict(per_channel=True, reduce_range=True, nodes_to_quantize=names)
        quantize_dynamic(model, str(file), **options)
    finally:
        logging.disable(logging.NOTSET)
    return len(products)
