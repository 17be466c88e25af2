"""The weights inside an ONNX file of a tower, read without a runtime.

Only constants are read. Exporters keep the names of biases and norms; a matrix loses its own, but
the name of the node that multiplies by it tells the layer it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import NodeProto, TensorProto, numpy_helper

from clipes.errors import WeightsError

_Constants: TypeAlias = Mapping[str, npt.NDArray[np.float32]]

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8)
_MATRIX = "onnx::MatMul_"  # what exporters call a matrix that lost its name
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
        layers = dict(_matrices(graph.node, constants))
    except (DecodeError, ValueError, TypeError, KeyError) as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(
            f"{where} is not a usable ONNX file: {reason}",
            "the file is damaged or of another kind; fetch it again from its original source",
        ) from error
    named = {key: value for key, value in constants.items() if not key.startswith(_MATRIX)}
    return {key: torch.from_numpy(value.copy()) for key, value in (named | layers).items()}


def _matrices(
    nodes: list[NodeProto], constants: _Constants
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the matrices of linear layers under the layers' names."""
    for node in nodes:
        layer = _LAYER.fullmatch(node.name)
        if layer is None or len(node.input) < 2:
            continue
        name = node.input[1]
        if node.op_type == "MatMulInteger":
            matrix = name.removesuffix("_quantized")
            codes = constants[name] - constants[f"{matrix}_zero_point"]
            value = codes * constants[f"{matrix}_scale"]
        elif node.op_type == "MatMul" and name in constants:  # not one of two activations
            value = constants[name]
        else:
            continue
        yield f"{layer.group(1).replace('/', '.')}.weight", np.ascontiguousarray(value.T)


def _array(item: TensorProto) -> npt.NDArray[np.float32]:
    if item.data_location == TensorProto.EXTERNAL:  # a path that the file could point anywhere
        raise ValueError(f"{item.name} is kept in another file")
    return np.asarray(numpy_helper.to_array(item), dtype=np.float32)
