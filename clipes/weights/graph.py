"""The weights inside an ONNX file of a tower, read without a runtime.

Only constants are read. Exporters keep the names of biases and norms; a matrix loses its own, but
the name of the node that multiplies by it tells the layer it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import NodeProto, TensorProto, numpy_helper

from clipes.errors import WeightsError
from clipes.types import Float32Array

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
_LAYER = re.compile(r"/(.+)/MatMul(_quant)?")


def read_graph(model: bytes, where: str) -> dict[str, torch.Tensor]:
    """Return the weights of a tower's ONNX graph in fp32.

    Matrices may be dynamically quantised: (in, out) int8 codes ``q`` with scale and zero point per
    output channel, which stand for ``(q - zero_point) * scale``.

    Args:
        model: The file's content.
        where: What to call the file in messages.

    Returns:
        Tensors under the names of the exported module; matrices of layers as PyTorch has them,
        (out, in), as ``LAYER.weight``. Other constants keep the names they have.

    Raises:
        WeightsError: It is no ONNX file, is damaged, or keeps its tensors in other files.
    """
    try:
        graph = onnx.load_model_from_string(model).graph
        constants = {
            item.name: _array(item) for item in graph.initializer if item.data_type in _TYPES
        }
        layers = dict(_take_matrices(graph.node, constants))
    except (DecodeError, ValueError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(
            f"{where} is not a usable ONNX file: {reason}",
            "the file is damaged or of another kind; fetch it again from its original source",
        ) from error
    return {name: torch.from_numpy(value) for name, value in (constants | layers).items()}


def _take_matrices(
    nodes: Iterable[NodeProto], constants: dict[str, Float32Array]
) -> Iterator[tuple[str, Float32Array]]:
    """Yield the matrices of linear layers under the layers' names.

    Each is taken out of ``constants``: no matrix can be multiplied by naming it in many nodes.
    """
    for node in nodes:
        layer = _LAYER.fullmatch(node.name)
        if layer is None or len(node.input) < 2:
            continue
        name = node.input[1]
        if node.op_type == "MatMulInteger":
            matrix = name.removesuffix("_quantized")
            parts = (name, f"{matrix}_zero_point", f"{matrix}_scale")
            if absent := [part for part in parts if part not in constants]:
                raise ValueError(f"{absent[0]} is missing or used twice")
            value = _dequantise(*(constants.pop(part) for part in parts))
        elif node.op_type == "MatMul" and name in constants:  # not one of two activations
            value = constants.pop(name)
        else:
            continue
        yield f"{layer.group(1).replace('/', '.')}.weight", value.T


def _dequantise(codes: Float32Array, zero_point: Float32Array, scale: Float32Array) -> Float32Array:
    for part in (zero_point, scale):
        if part.shape not in ((), (1,), codes.shape[1:]):  # else the result could be of any size
            raise ValueError(f"codes of shape {codes.shape} have scales of shape {part.shape}")
    return (codes - zero_point) * scale


def _array(item: TensorProto) -> Float32Array:
    if item.data_location == TensorProto.EXTERNAL:  # a path that the file could point anywhere
        raise ValueError(f"{item.name} is kept in another file")
    return np.array(numpy_helper.to_array(item), dtype=np.float32)
