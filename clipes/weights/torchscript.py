"""The tensors of a TorchScript archive, such as OpenAI's files, without running anything in it.

``torch.load(weights_only=True)`` refuses these archives and ``torch.jit.load`` executes the program
they contain. All that is needed is in two places: ``data.pkl`` names every tensor, ``data/<key>``
holds its bytes. The pickle is read with a closed list of names, each of which stands for a record
of this module; nothing is ever imported or called on the archive's behalf.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from clipes.errors import WeightsError

_DTYPES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

MALFORMED = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading a malformed pickle or zip file may raise, by documentation and by trial.

The recursion limit and unsupported zip features are RuntimeErrors, bad UTF-8 is a ValueError.
"""


class _Record:
    """What a name in the pickle stands for: the arguments and the state given to it."""

    args: tuple[Any, ...] = ()
    state: object = None

    def __init__(self, *args: object) -> None:
        self.args = args

    # Also keeps the pickle from setting attributes of the classes themselves.
    def __setstate__(self, state: object) -> None:
        self.state = state


class _Module(_Record):
    """A module or any other object of the archive's own program."""


class _TensorRecord(_Record):
    """Arguments of torch._utils._rebuild_tensor_v2: storage, offset, size, stride, and more."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - pickle's signature
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _TensorRecord
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.split(".")[0] == "__torch__" or module == "torch.jit._pickle":
            return _Module
        raise pickle.UnpicklingError(f"it names {module}.{name}, which weights have no use for")

    def persistent_load(self, pid: object) -> object:
        return pid


def is_torchscript(path: Path) -> bool:
    """Return whether ``path`` is a TorchScript archive, judged by the entries of the zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except MALFORMED:
        return False


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive by their dotted names.

    Args:
        path: A file for which ``is_torchscript`` holds.

    Returns:
        Parameters and buffers in the order and in the types they are stored in.

    Raises:
        WeightsError: The archive is corrupt, or its pickle holds anything but modules and tensors.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(n for n in archive.namelist() if n.endswith("/constants.pkl"))
            root = root.removesuffix("constants.pkl")
            data = _Unpickler(io.BytesIO(_read(archive, f"{root}data.pkl"))).load()
            tensors: dict[str, torch.Tensor] = {}
            _collect(data, "", f"{root}data/", archive, tensors, set())
            return tensors
    except MALFORMED as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(
            f"{path} is not a usable TorchScript archive: {reason}",
            "take the file from its original source",
        ) from error


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch stores these entries as they are; a compressed one could be a bomb.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"entry {name} is compressed")
    return archive.read(name)


def _collect(
    node: object,
    prefix: str,
    storages: str,
    archive: zipfile.ZipFile,
    tensors: dict[str, torch.Tensor],
    seen: set[int],
) -> None:
    """Walk the modules below ``node`` and add their tensors to ``tensors``."""
    if not isinstance(node, _Module) or not isinstance(node.state, dict) or id(node) in seen:
        return
    seen.add(id(node))
    for name, value in node.state.items():
        if isinstance(value, _TensorRecord):
            tensors[f"{prefix}{name}"] = _build(value, storages, archive)
        else:
            _collect(value, f"{prefix}{name}.", storages, archive, tensors, seen)


def _build(record: _TensorRecord, storages: str, archive: zipfile.ZipFile) -> torch.Tensor:
    """Return the tensor that ``record`` describes, a view of nothing but its own bytes."""
    (_, dtype, key, *_), offset, size, stride, *_ = record.args
    flat = torch.frombuffer(bytearray(_read(archive, f"{storages}{key}")), dtype=dtype)
    if math.prod(size) > len(flat):
        raise ValueError(f"a tensor of shape {tuple(size)} has only {len(flat)} values")
    return flat.as_strided(size, stride, offset)
