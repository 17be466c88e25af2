"""The run folder: where stages meet.

::

    runs/voc/run.json             what made it: schema, command, settings, hashes, package versions
             cams/<id>.npz        labels (K,) int64, maps (K, h, w) float16, size (H0, W0), and
                                  drift (K,) float16 where classes were learnt
             pseudo/<id>.png      8-bit palette PNG: 0 background, 1..C, 255 ignore
             confidence/<id>.png  16-bit grey, round(65535 * p)
             looks/               what the classes look like, over many images
             words/               class vectors, where they were fitted to the run's own labels
             labels.csv           zero-shot tags, if the labels are such; may be corrected
             tags/<id>.npz        what they were chosen from; may be removed
             relabelled/          pseudo/ and confidence/ once more, as a trained segmenter says
             corrected/           likewise, as a person mended them; confidence 1

Every file is complete or absent. Maps, masks and confidence maps say what they were made from
(``clipes.run.origin``); an image is done if its files are there and were made from what is there
now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from clipes.config import AUTO_LABELS
from clipes.disk.claim import IN_PARTS, claim, remove_leftovers
from clipes.disk.files import (
    check_id,
    list_files,
    read_arrays,
    read_json,
    read_text_array,
    write_arrays,
    write_json,
)
from clipes.disk.images import (
    MAX_PIXELS,
    MAX_TILED_PIXELS,
    read_confidence,
    read_mask,
    write_confidence,
    write_mask,
)
from clipes.errors import ArtifactError, RunConflictError
from clipes.run.record import (
    CamRecord,
    RefineRecord,
    RelabelRecord,
    TrainRecord,
    parse_section,
)
from clipes.types import MAX_CLASSES, CamMaps, PseudoLabel

_T = TypeVar("_T")

SCHEMA = 1
"""Version of the run folder's layout."""

FOLDERS = {
    "words": "words",
    "looks": "looks",
    "cam": "cams",
    "refine": "pseudo",
    "train-seg": "checkpoints",
    "relabel": "relabelled/pseudo",
}
"""The folder whose files say which images a stage has done."""

_OTHER_FOLDER = "use the same settings, another folder (--out), or delete this one"
_OTHER_SETTINGS = {  # of stages that write into the folder of another
    "refine": "use the same settings, or remove its folders pseudo and confidence and start over, "
    "in one process"
}
_CLASSES = (
    "where no list says which classes there are, they are the names that occur: write all of them "
    "into classes.txt, one a line and in this order, or use another folder (--out)"
)
_DIGESTS = ("sha256",)
_MEANING = {
    "weights.sha256": ": the weights are not the same file",
    "text.sha256": ": other words or vectors (--prompts, --template, --text-features)",
}
_PACKAGES = ("clipes", "torch", "open_clip_torch", "numpy", "opencv-python-headless", "pillow")
_LARGEST_MANIFEST = 1 << 24  # bytes
_LARGEST_MAPS = 1 << 30  # bytes; 254 classes at 4096 patches in float32 are 4 MB


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        root: Its path.
    """

    root: Path

    @property
    def manifest_path(self) -> Path:
        """The file that says what made this run."""
        return self.root / "run.json"

    @property
    def tags_path(self) -> Path:
        """Where zero-shot tags are, a label file."""
        return self.root / "labels.csv"

    def candidates_path(self, image_id: str) -> Path:
        """Where it is what an image says of the classes, before zero-shot tags are chosen."""
        return self.root / "tags" / f"{check_id(image_id)}.npz"

    def claim(
        self,
        stage: str,
        *,
        shared: bool = False,
        on_wait: Callable[[], None] | None = None,
        otherwise: str = IN_PARTS,
    ) -> AbstractContextManager[None]:
        """Keep other processes from the same stage of this run; see ``clipes.disk.claim``.

        Args:
            stage: A stage of ``FOLDERS``.
            shared: Whether this process does only a part of the images.
            on_wait: Called once before waiting for another process; None to give up instead.
            otherwise: What can be done rather than wait, for the message.
        """
        folder, doing = self.root / FOLDERS[stage], f"clipes {stage}"
        return claim(folder, doing, shared=shared, on_wait=on_wait, otherwise=otherwise)

    @property
    def relabelled(self) -> Run:
        """The folder of a segmenter's masks; its ``pseudo`` and ``confidence`` are as a run's."""
        return Run(self.root / "relabelled")

    @property
    def corrected(self) -> Run:
        """The folder of masks that a person mended; laid out as ``relabelled`` is."""
        return Run(self.root / "corrected")

    @property
    def looks_path(self) -> Path:
        """Where the sums are that say what the classes look like."""
        return self.root / "looks" / "statistics.npz"

    @property
    def words_path(self) -> Path:
        """Where the class vectors are that were fitted to this run, see ``--text-features``."""
        return self.root / "words" / "vectors.npz"

    def exists(self) -> bool:
        """Tell whether the folder is a run folder."""
        return self.manifest_path.is_file()

    def cams_path(self, image_id: str) -> Path:
        """Where the maps of an image are."""
        return self.root / "cams" / f"{check_id(image_id)}.npz"

    def pseudo_path(self, image_id: str) -> Path:
        """Where the pseudo-mask of an image is."""
        return self.root / "pseudo" / f"{check_id(image_id)}.png"

    def confidence_path(self, image_id: str) -> Path:
        """Where the confidence map of an image is."""
        return self.root / "confidence" / f"{check_id(image_id)}.png"

    def ids(self, stage: str) -> list[str]:
        """Return the sorted ids that have a file in the folder of a stage (cams, pseudo, ...)."""
        return [path.stem for path in list_files(self.root / stage)]

    def has_pseudo(self, image_id: str) -> bool:
        """Tell whether an image has both its mask and its confidence map."""
        return self.pseudo_path(image_id).exists() and self.confidence_path(image_id).exists()

    def save_cams(self, image_id: str, cams: CamMaps, *, origin: str = "") -> None:
        """Write maps, as float16.

        Args:
            image_id: Whose they are.
            cams: The maps.
            origin: What they were made from, see ``clipes.run.origin``; empty for nothing.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "labels": cams.labels.astype(np.int64),
            "maps": cams.maps.astype(np.float16),
            "size": np.array(cams.size, np.int64),
        }
        if cams.drift is not None:
            arrays["drift"] = cams.drift.astype(np.float16)
        if origin:
            arrays["origin"] = np.array(origin)
        write_arrays(self.cams_path(image_id), arrays, compress=True)

    def load_cams(self, image_id: str, *, most: int = MAX_PIXELS) -> CamMaps:
        """Read maps.

        Args:
            image_id: Whose they are.
            most: Most pixels that the image may have: few stages work in tiles.

        Raises:
            ArtifactError: The file is missing or malformed, or the image is larger.
        """
        path = self.cams_path(image_id)
        remedy = "delete it and run 'clipes cam' again"
        try:
            arrays = read_arrays(path, _LARGEST_MAPS)
            labels, maps, size = arrays["labels"], arrays["maps"], arrays["size"]
            drift = arrays.get("drift")
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(f"cannot read maps {path}: {reason}", remedy) from error
        well_formed = (
            labels.dtype == np.int64
            and maps.dtype.kind == "f"
            and maps.ndim == 3
            and maps.size > 0
            and labels.shape == maps.shape[:1]
            and size.shape == (2,)
            and size.dtype.kind == "i"
            and bool((size > 0).all())
            and (drift is None or (drift.dtype.kind == "f" and drift.shape == labels.shape))
        )
        if not well_formed:
            raise ArtifactError(
                f"maps {path}: labels {labels.dtype} {labels.shape}, maps {maps.dtype} "
                f"{maps.shape}, size {size.dtype} {size.shape} do not fit together",
                remedy,
            )
        problem = ""
        if labels.min() < 0 or labels.max() >= MAX_CLASSES:
            problem = f"there is no class {labels.min() if labels.min() < 0 else labels.max()}"
        elif not all(  # values that are no numbers fail this, too
            0 <= part.min() <= part.max() <= 1 for part in (maps, drift) if part is not None
        ):
            problem = "its values do not lie in [0, 1]"
        elif int(size[0]) * int(size[1]) > MAX_TILED_PIXELS:
            problem = f"no image has {size[0]} x {size[1]} pixels"
        elif int(size[0]) * int(size[1]) > most:
            problem = f"the image has {size[0]} x {size[1]} pixels, more than are held at once"
            remedy = "only cam, refine, eval and predict work in tiles"
        if problem:
            raise ArtifactError(f"maps {path}: {problem}", remedy)
        return CamMaps(labels, maps, (int(size[0]), int(size[1])), drift)

    def maps_origin(self, image_id: str) -> str:
        """Return what the maps of an image say that they were made from; empty if they do not.

        Maps that are missing or damaged say nothing.
        """
        try:
            return read_text_array(self.cams_path(image_id), "origin")
        except (OSError, ValueError):
            return ""

    def save_pseudo(self, image_id: str, pseudo: PseudoLabel, *, origin: str = "") -> None:
        """Write a pseudo-mask and its confidence; the mask last, so that it stands for both.

        Args:
            image_id: Whose they are.
            pseudo: Both.
            origin: What they were made from, see ``clipes.run.origin``; empty for nothing.
        """
        write_confidence(self.confidence_path(image_id), pseudo.confidence, origin=origin)
        write_mask(self.pseudo_path(image_id), pseudo.mask, origin=origin)

    def load_pseudo(self, image_id: str) -> PseudoLabel:
        """Read a pseudo-mask and its confidence.

        Raises:
            ArtifactError: A file is missing, malformed, or of another size.
        """
        mask = read_mask(self.pseudo_path(image_id))
        confidence = read_confidence(self.confidence_path(image_id))
        if mask.shape != confidence.shape:
            raise ArtifactError(
                f"{self.pseudo_path(image_id)} is {mask.shape}, its confidence {confidence.shape}",
                "delete both and make them again",
            )
        return PseudoLabel(mask, confidence)

    def manifest(self) -> dict[str, Any]:
        """Return run.json.

        Raises:
            ArtifactError: There is none, or it is not one of ours.
        """
        path = self.manifest_path
        try:
            manifest = read_json(path, _LARGEST_MANIFEST)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{self.root} is not a run folder: it has no run.json", "run 'clipes cam' first"
            ) from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read {path}: {error}") from error
        known = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA
        if not known or not isinstance(manifest.get("stages"), dict):
            raise ArtifactError(
                f"{path} is not of schema {SCHEMA}", "make the run again in another folder"
            )
        checked: dict[str, Any] = manifest
        return checked

    def stage(self, name: str) -> dict[str, Any]:
        """Return what run.json says of a stage: command, settings, packages.

        Raises:
            ArtifactError: The stage has not run here.
        """
        stages = self.manifest()["stages"]
        if not isinstance(stages.get(name), dict):
            raise ArtifactError(
                f"{self.root} has no output of '{name}'", f"run 'clipes {name}' first"
            )
        section: dict[str, Any] = stages[name]
        return section

    def cam_record(self) -> CamRecord:
        """Return what run.json says of ``cam``.

        Raises:
            ArtifactError: The stage has not run here, or what it says cannot be used.
        """
        source = f"{self.manifest_path} does not say how the maps were made"
        return parse_section(self.stage("cam"), CamRecord, source)

    def commands(self) -> list[str]:
        """Return the command lines that run.json knows, in the order of their first use."""
        sections = self.manifest()["stages"].values()
        # ``clipes run`` stands at each of its stages.
        return list(dict.fromkeys(str(it["command"]) for it in sections if "command" in it))

    def train_record(self) -> TrainRecord | None:
        """Return what run.json says of ``train-seg``; None if it did not run here.

        Raises:
            ArtifactError: There is no run.json, or what it says cannot be used.
        """
        return self._record("train-seg", TrainRecord, "how the segmenter was trained")

    def refine_record(self) -> RefineRecord | None:
        """Return what run.json says of ``refine``; None if it did not run here.

        Raises:
            ArtifactError: There is no run.json, or what it says cannot be used.
        """
        return self._record("refine", RefineRecord, "how the masks were made")

    def relabel_record(self) -> RelabelRecord | None:
        """Return what run.json says of ``relabel``; None if it did not run here.

        Raises:
            ArtifactError: There is no run.json, or what it says cannot be used.
        """
        return self._record("relabel", RelabelRecord, "how the images were labelled again")

    def _record(self, stage: str, kind: type[_T], lacks: str) -> _T | None:
        section = self.manifest()["stages"].get(stage)
        if section is None:
            return None
        return parse_section(section, kind, f"{self.manifest_path} does not say {lacks}")

    def check_settings(self, stage: str, settings: Mapping[str, Any]) -> None:
        """Refuse settings other than those that a stage ran with here; arguments as for ``begin``.

        Raises:
            RunConflictError: The stage ran here with other settings.
        """
        if self.exists():
            section = self.manifest()["stages"].get(stage) or {}
            if "settings" in section:
                before, now = _compared(section["settings"]), _compared(_plain(settings))
                # The same weights under another name are the same.
                old, new = before.get("weights"), now.get("weights")
                if old and new and old.get("sha256") == new.get("sha256"):
                    before["weights"] = new
                check_same(self.root, stage, before, now)

    def begin(
        self,
        stage: str,
        settings: Mapping[str, Any],
        command: str,
        facts: Mapping[str, Any] | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Record that a stage runs with ``settings``, or check that it did so before.

        Args:
            stage: Its command: cam, refine, ...
            settings: All that changes its output, as plain data.
            command: The command line.
            facts: What is worth recording but does not change the output.
            anew: Whether other settings take the place of those before, rather than being refused.

        Raises:
            RunConflictError: The stage ran here with other settings.
            WriteError: The folder cannot be written to.
        """

        def record(stages: dict[str, Any]) -> None:
            if not anew:
                self.check_settings(stage, settings)
            stages[stage] = {
                "command": command,
                "settings": _plain(settings),
                "facts": _plain(facts or {}),
                "packages": _versions(),
            }

        others = ("relabelled/confidence", "corrected/pseudo", "corrected/confidence")
        for folder in ("confidence", "predictions", *others):
            remove_leftovers(self.root / folder)
        self._change(record)

    def note_fact(self, stage: str, name: str, value: object) -> None:
        """Change one fact that is recorded of a stage that ran, such as where the data set is.

        Raises:
            ArtifactError: The stage has not run here.
            WriteError: The folder cannot be written to.
        """
        if self.stage(stage).get("facts", {}).get(name) == value:
            return

        def record(stages: dict[str, Any]) -> None:
            stages[stage].setdefault("facts", {})[name] = value

        self._change(record)

    def touch(self) -> None:
        """Make this the run that was worked on last, for ``latest_run``, if it may be written."""
        with suppress(OSError):
            os.utime(self.manifest_path)

    def forget(self, stage: str, *, like: Run) -> None:
        """Drop what is recorded of a stage; a folder without a record takes over all but that.

        Args:
            stage: Its command.
            like: The run that the record is taken over from.

        Raises:
            ArtifactError: ``like`` is no run.
            WriteError: The folder cannot be written to.
        """

        def record(stages: dict[str, Any]) -> None:
            if not stages:
                stages.update(like.manifest()["stages"])
            stages.pop(stage, None)

        self._change(record)

    def _change(self, record: Callable[[dict[str, Any]], None]) -> None:
        # One process at a time: two stages that begin at once would lose each other's record.
        with claim(self.root, "clipes", on_wait=lambda: None):
            manifest: dict[str, Any] = {"schema": SCHEMA, "stages": {}}
            if self.manifest_path.exists():
                manifest = self.manifest()
            record(manifest["stages"])
            write_json(self.manifest_path, manifest)


def latest_run(parent: Path) -> Run:
    """Return the run below ``parent`` that a stage was started in last.

    Of ``cam`` that counts also where there was nothing to do.

    Raises:
        ArtifactError: There is none.
    """
    manifests = sorted(parent.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise ArtifactError(
            f"no run found below {parent.absolute()}",
            "run 'clipes cam --dataset ...' first, or name the run folder",
        )
    return Run(manifests[-1].parent)


def check_same(
    root: Path, stage: str, before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> None:
    """Compare the settings a folder was made with and those asked for, both plain nested data.

    Args:
        root: The folder, for the message.
        stage: The command that made it, for the message.
        before: Its settings.
        now: Those asked for.
        prefix: What their names in the message start with.

    Raises:
        RunConflictError: They differ.
    """
    # What has a name is named: digests come last.
    for key in sorted({*before, *now}, key=lambda key: (key in _DIGESTS, key != "name", key)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            check_same(root, stage, old, new, f"{prefix}{key}.")
        elif old != new:
            raise RunConflictError(
                f"{root} was made by '{stage}' with {prefix}{key} = {_short(old)}, "
                f"not {_short(new)}{_MEANING.get(prefix + key, '')}",
                _CLASSES if key == "classes" else _OTHER_SETTINGS.get(stage, _OTHER_FOLDER),
            )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data as it is once it has been in a JSON file: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must stay the same.

    The path of a label file need not: what counts is each image's labels, which every file that is
    made of them remembers. A list of images is the same by whatever path it is named.
    """
    compared = dict(settings)
    if compared.get("labels") not in (None, AUTO_LABELS):
        compared["labels"] = None
    for name in ("split", "val"):
        # A bare name is that of a list of the data set, whatever lies in this folder. An older
        # clipes wrote a file's path as it was given.
        said = Path(compared.get(name) or "")
        if (said.name != str(said) or said.suffix == ".txt") and said.is_file():
            compared[name] = str(said.resolve())
    return compared


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _versions() -> dict[str, str]:
    installed = {found.name: found.version for found in metadata.distributions()}
    return {name: installed.get(name, "unknown") for name in _PACKAGES}
