"""Whether this machine is ready: versions, weights, data, disk; nothing is fetched or written."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipes import __version__
from clipes.errors import ClipesError, DatasetError

# Everything else is imported where it is used, because it may be what is missing.
if TYPE_CHECKING:
    from clipes.datasets import Dataset

_KINDS = ("voc", "coco", "folder", "examples")

_MODULES = {"open-clip-torch": "open_clip", "opencv-python-headless": "cv2", "pillow": "PIL"}
"""Modules whose package has another name."""

_OPTIONAL = {
    "scikit-image": ("skimage", "the bundled examples", "pip install 'clipes[examples]'"),
    "tensorboard": ("tensorboard", "logs of train-seg", "pip install 'clipes[train]'"),
    "pydensecrf2": ("pydensecrf", "refine --crf pydensecrf", "pip install 'clipes[crf]'"),
}
_LEAST = 200e6  # bytes without which a run cannot even begin
_LITTLE = 5e9  # VOC's 10 582 images take about 1 GB of maps and masks, checkpoints the rest
_FETCHED = 750e6  # OpenAI's archive and what is made of it
# What importing a library raises that is absent, broken, or built for another one's version.
_BROKEN = (ImportError, OSError, RuntimeError, ValueError, AttributeError)


class State(str, Enum):
    """How a check went."""

    ok = "ok"
    note = "note"
    missing = "missing"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: How it is.
        detail: What was found.
        remedy: What to do, where something is missing or could be better.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Line:
    """A command, and whether it would run here.

    Attributes:
        command: As it would be typed.
        missing: Names of the checks that it fails on; empty if it would run.
    """

    command: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at.

    Attributes:
        checks: In the order they are told in.
        lines: The commands from images to scores.
    """

    checks: tuple[Check, ...]
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether every line would run."""
        return not any(line.missing for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "ok": self.ok,
            "clipes": __version__,
            "checks": [{**asdict(check), "state": check.state.value} for check in self.checks],
            "lines": [
                {"command": line.command, "runs": not line.missing, "missing": list(line.missing)}
                for line in self.lines
            ],
        }


def diagnose(kind: str | None, root: Path | None, out: Path) -> Diagnosis:
    """Look at everything that the lines from images to scores need.

    Args:
        kind: The data set they are to run on; None for the first of voc, coco, folder and examples
            that is there.
        root: Its folder; if None, ``$CLIPES_DATA``, else ``datasets/``.
        out: Folder below which runs go.
    """
    packages = [*map(_package, _required()), *_extras()]
    broken = [check.name for check in packages if check.state is State.missing]
    if broken:
        return _without(broken, packages)
    found = {name: _data(name, root) for name in ([kind] if kind else _KINDS)}
    chosen = kind or next((n for n, (c, _) in found.items() if c.state is not State.missing), "voc")
    data, truth = found[chosen]
    others = [
        check if check.state is State.ok else replace(check, state=State.note)
        for name, (check, _) in found.items()
        if name != chosen
    ]
    weights, runs = _weights(), _disk("disk: runs", out, _LITTLE)
    cache = _cache_disk(fetch=weights.state is State.missing)
    checks = [*packages, *_machine(), weights, _second_tower(), data, truth, *others, runs, cache]
    bad = {check.name for check in checks if check.state is State.missing}

    def line(command: str, *needs: Check) -> Line:
        return Line(command, tuple(check.name for check in (*needs, runs) if check.name in bad))

    where = f" --root {root}" if root else ""
    score = "make eval" if shutil.which("make") and Path("Makefile").is_file() else "clipes eval"
    lines = (
        line(f"clipes cam --dataset {chosen}{where}", weights, cache, data),
        line("clipes refine"),
        line("clipes train-seg --cgl"),
        line(score, truth),
    )
    return Diagnosis(tuple(checks), lines)


def _without(broken: Sequence[str], packages: Sequence[Check]) -> Diagnosis:
    """Return what can be said without one of the libraries that everything needs."""
    commands = ("clipes cam", "clipes refine", "clipes train-seg --cgl", "clipes eval")
    lines = tuple(Line(command, tuple(broken)) for command in commands)
    python = Check("python", State.ok, platform.python_version())
    return Diagnosis((*packages, python), lines)


def _required() -> list[str]:
    """Return the packages that clipes always needs, in the words of its own metadata."""
    try:
        lines = metadata.requires("clipes") or []
    except metadata.PackageNotFoundError:  # it runs from its source
        return []
    return [re.split(r"[^\w.-]", line)[0].replace("_", "-") for line in lines if ";" not in line]


def _package(package: str) -> Check:
    name, module = f"package: {package}", _MODULES.get(package, package)
    try:
        import_module(module)
    except _BROKEN as error:
        reason = " ".join(str(error).split())[:200]
        return Check(name, State.missing, reason, f"pip install {package}")
    return Check(name, State.ok, _version(package))


def _extras() -> Iterator[Check]:
    for package, (module, use, remedy) in _OPTIONAL.items():
        name = f"package: {package}"
        if find_spec(module) is None:
            yield Check(name, State.note, f"not installed; only for {use}", remedy)
        else:
            yield Check(name, State.ok, _version(package))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _machine() -> Iterator[Check]:
    import torch

    yield Check("clipes", State.ok, f"{__version__} on Python {platform.python_version()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS")
    threads = f"; OMP_NUM_THREADS={asked}" if asked else ""
    taken = torch.get_num_threads()
    yield Check("threads", State.ok, f"{cores} cores, torch takes {taken}{threads}")
    names = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        for index in range(torch.cuda.device_count())
    ]
    yield Check("devices", State.ok, ", ".join([*names, f"cpu {platform.machine()}"]))
    backends = ["numba", *(["pydensecrf"] if find_spec("pydensecrf") else [])]
    yield Check("CRF backends", State.ok, ", ".join(backends))


def _weights() -> Check:
    from clipes.weights import cache_dir, cached, find

    here = [f"{entry.model} {entry.name}" for entry in cached()]
    chosen = find("auto")
    if chosen is None:
        held = f", only {', '.join(here)}" if here else ""
        return Check(
            "weights",
            State.missing,
            f"none for auto in {cache_dir()}{held}",
            "run 'clipes weights fetch', or give a file with --weights",
        )
    detail = f"auto is {chosen.model} {chosen.name} in {chosen.path}"
    if len(here) > 1:
        detail += f"; cached are {', '.join(here)}"
    if chosen.has_text is False:
        return Check(
            "weights",
            State.note,
            f"{detail}; without a text tower: class vectors are the shipped stand-in's",
            "'clipes weights fetch openai' gets words of your own",
        )
    return Check("weights", State.ok, detail)


def _second_tower() -> Check:
    from clipes.weights import DINOV2, cache_dir, find

    if (found := find("auto", DINOV2)) is not None:
        return Check("second tower", State.ok, f"auto is {DINOV2} {found.name} in {found.path}")
    return Check(
        "second tower",
        State.note,
        f"no {DINOV2} for auto in {cache_dir()}",
        f"'clipes weights fetch {DINOV2}', or 'clipes cam' fetches it; --preset clip does without",
    )


def _data(kind: str, root: Path | None) -> tuple[Check, Check]:
    """Return whether a data set is there, and whether it has ground truth."""
    name, truth = f"data: {kind}", f"ground truth: {kind}"
    if kind == "examples":
        return _examples(name, truth)
    try:
        data = _open(kind, root)
    except ClipesError as error:
        nothing = Check(truth, State.missing, "not looked for", "find the data set first")
        return Check(name, State.missing, error.what, error.remedy), nothing
    detail = f"{len(data.samples)} images in {data.root}"
    state = State.ok if data.samples else State.missing
    remedy = ""
    if data.failures:
        detail += f", {len(data.failures)} more cannot be used"
        remedy = f"'clipes check --dataset {kind}' names them"
        state = state if state is State.missing else State.note
    masks = sum(sample.mask is not None for sample in data.samples)
    if masks:
        return Check(name, state, detail, remedy), Check(truth, State.ok, f"{masks} masks")
    draw = "run 'clipes masks'" if kind == "coco" else "add masks"
    lack = Check(truth, State.missing, "no masks", f"{draw}, or name a folder: eval --gt")
    return Check(name, state, detail, remedy), lack


def _open(kind: str, root: Path | None) -> Dataset:
    """Open a data set; of COCO, whose labels are half a gigabyte, only look whether they exist."""
    from clipes.datasets import open_dataset
    from clipes.datasets.coco import find_coco, instance_files
    from clipes.datasets.labels import find_label_file

    if kind != "coco":
        return open_dataset(kind, root=root)
    data = open_dataset(kind, root=root, labelled=False)
    base = find_coco(root)
    if not instance_files(base, None) and find_label_file(base) is None:
        raise DatasetError(
            f"no instances file in {base / 'annotations'}", "download COCO's annotations"
        )
    return data


def _examples(name: str, truth: str) -> tuple[Check, Check]:
    if find_spec("skimage") is None:
        lack = "the photos are scikit-image's, which is missing"
        remedy = "pip install 'clipes[examples]'"
        return Check(name, State.missing, lack, remedy), Check(truth, State.missing, lack, remedy)
    return (
        Check(name, State.ok, "photos of the scikit-image that is installed"),
        Check(truth, State.ok, "outlines that come with clipes"),
    )


def _cache_disk(*, fetch: bool) -> Check:
    from clipes.weights import cache_dir

    wanted = _FETCHED if fetch else 0.0
    return _disk("disk: cache", cache_dir(), wanted, least=wanted)


def _disk(name: str, folder: Path, enough: float, least: float = _LEAST) -> Check:
    """Look at the disk of a folder that may have to be made yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        remedy = "change its permissions, or choose another folder (--out, CLIPES_CACHE)"
        return Check(name, State.missing, f"{place} cannot be written to", remedy)
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {folder}"
    if free < least:
        return Check(name, State.missing, detail, "make room, or choose another disk")
    if free < enough:
        return Check(name, State.note, detail, f"a whole data set may take {enough / 1e9:.0f} GB")
    return Check(name, State.ok, detail)
