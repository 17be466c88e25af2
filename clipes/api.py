"""clipes from Python: what ``cam``, ``refine`` and ``predict`` do, to one image or a folder."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipes.config import CrfParams, Preset, get_preset, kind_of
from clipes.datasets import open_dataset
from clipes.datasets.base import class_index
from clipes.datasets.problems import ProblemError
from clipes.device import batch_size, choose_device, share_processor
from clipes.disk.images import read_image, to_pixels
from clipes.errors import ImageError, UnknownClassError, UsageError, VocabularyError
from clipes.listener import Listener
from clipes.maps.maker import CamMaker
from clipes.masks.pseudo import pseudo_label
from clipes.run.folder import Run
from clipes.run.loop import Outcome
from clipes.seg.checkpoint import load_checkpoint
from clipes.seg.kinds import predictor_for
from clipes.seg.label import label_image
from clipes.seg.recipes import LabelPredictor
from clipes.stages.cam import CamRequest, ClipRequest, DataRequest, Resources
from clipes.stages.learn_looks import load_looks
from clipes.stages.run import FolderResult, RunRequest, make_run_of
from clipes.stages.setup import Clip, load_clip, load_others
from clipes.stages.token_source import TowerRequest, tokens_of
from clipes.stages.with_clip import load_for, maps_with
from clipes.types import CamMaps, Progress, PseudoLabel, UInt8Array
from clipes.words.vocabulary import Vocabulary, load_vocabulary

Picture: TypeAlias = str | Path | Image.Image | npt.NDArray[np.uint8]
"""A file, a picture that Pillow opened, or (H, W, 3) RGB uint8."""

Label: TypeAlias = str | int | np.integer[Any]
"""A class: its name, or its 0-based index."""

_log = logging.getLogger("clipes")


Follow: TypeAlias = Callable[[str, int, int], None]
"""Called as ``follow(stage, done, total)`` while a folder is worked on."""


class PseudoLabeler:
    """Makes maps and masks of one image after another, or of a folder; ``load`` makes one.

    Args:
        clip: The image tower, and the vectors of the classes; or why there are none, where ``run``
            is to fit them.
        preset: What is done to an image.
        vocabulary: The words that the vectors are of.
        asked: How weights and vectors were asked for.
        looks: Run folder that says what the classes look like; None for each image on its own.
        prompts: The vocabulary by its name, where ``preset`` has the lambda of a data set, so that
            ``run`` takes that of its own; None for a preset that is taken as it is.
    """

    def __init__(
        self,
        clip: Clip | UnknownClassError,
        preset: Preset,
        vocabulary: Vocabulary,
        asked: ClipRequest,
        looks: Path | None = None,
        prompts: str | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._prompts = prompts
        self._asked = asked
        self._loaded = clip
        self._preset = preset
        self._looks = looks
        if not isinstance(clip, UnknownClassError):
            self._maker  # noqa: B018  (what is wrong with the looks is told at once)

    @property
    def _clip(self) -> Clip:
        if isinstance(self._loaded, UnknownClassError):
            raise UnknownClassError(
                self._loaded.what,
                "call run() on images with labels, which fits vectors; for single images then load "
                "with text_features='RUN/words/vectors.npz'",
            ) from self._loaded
        return self._loaded

    @cached_property
    def _maker(self) -> CamMaker:
        preset, looks = self._preset, self._looks
        if looks is None:
            return CamMaker(self._clip.towers, self._clip.text, preset.cam)
        patches = preset.cam.patches
        if patches is None or not patches.learns:
            raise UsageError(f"preset '{preset.name}' has no use for looks", "leave it out")
        maker = CamMaker(self._complete.towers, self._clip.text, preset.cam)
        return load_looks(Run(looks), maker, patches)

    @cached_property
    def _complete(self) -> Clip:
        """CLIP with the towers that look at images beside it, where something is learnt."""
        patches = self._preset.cam.patches
        names = () if patches is None else patches.towers
        others = load_others(names, self._asked, Listener(_log.info))
        return replace(self._clip, towers=replace(self._clip.towers, others=others))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; class k has mask value k + 1."""
        return self._vocabulary.classes

    @property
    def preset(self) -> Preset:
        """What is done to an image."""
        return self._preset

    @property
    def note(self) -> str:
        """What a reader of the results must know of the class vectors; may be empty."""
        if isinstance(self._loaded, UnknownClassError):
            return f"{self._loaded.what}: run() fits vectors to its images and labels"
        return self._loaded.text.note

    def segment(self, image: Picture, labels: Label | Sequence[Label]) -> PseudoLabel:
        """Return the mask of an image, and how sure each of its pixels is.

        Args:
            image: A path, a Pillow picture, or an (H, W, 3) RGB uint8 array (OpenCV reads BGR).
            labels: What is in it: names or 0-based indices of ``classes``.

        Returns:
            mask (H, W) uint8, 0 background, class k as k + 1; confidence (H, W) in [0, 1].

        Raises:
            ImageError: The image cannot be read or used.
            VocabularyError: A label is none of the classes, or a class has no vector.
            UsageError: There is no label.
        """
        pixels = _pixels(image)
        return self.refine(pixels, self.maps(pixels, labels))

    def maps(self, image: Picture, labels: Label | Sequence[Label]) -> CamMaps:
        """Return the activation maps of an image, without the CRF; as ``segment``.

        Returns:
            maps (K, h, w) in [0, 1] at one value per patch, in the order of ``labels``.
        """
        return self._maker(_pixels(image), _indices(labels, self.classes))

    def refine(self, image: Picture, maps: CamMaps) -> PseudoLabel:
        """Return the mask that the dense CRF makes of an image and its maps.

        Args:
            image: As for ``segment``.
            maps: What ``maps`` returned for it.

        Raises:
            ImageError: The image cannot be read, or the maps are of one of another size.
        """
        exponent = self._preset.background_exponent
        return pseudo_label(_pixels(image), maps, self._preset.crf, background_exponent=exponent)

    def run(
        self,
        images: str | Path,
        out: str | Path,
        *,
        dataset: str = "folder",
        labels: str | Path | None = None,
        split: str | None = None,
        workers: int | None = None,
        follow: Follow | None = None,
        train: bool = False,
        resume: bool = True,
        predict_on: str | Path | None = None,
        tile: int | None = None,
    ) -> FolderResult:
        """Make maps, masks, confidence maps and the report of all images of a data set.

        It is what ``clipes run`` does, in the same run folder: what is there and was made from what
        there is now stays, so a call that was stopped is simply repeated. With preset ``default``
        what the classes look like is learnt from these images; classes that no vector knows get one
        from these images and their labels (``load(fit=...)``).

        Args:
            images: Folder of the data set.
            out: Run folder.
            dataset: Kind of data set: ``folder``, ``voc``, ``coco``, ``examples``.
            labels: Label file instead of the one, or the annotations, of the data set.
            split: List of images; None for all, of ``voc`` and ``coco`` those of ``train``.
            workers: Images at once; None for as many as suit the machine.
            follow: Told how far each step is.
            train: Whether a segmenter is trained on the masks, as ``clipes train-seg`` does.
            resume: Whether a training that was stopped goes on; else it starts over.
            predict_on: Folder of images without labels that the segmenter makes masks of.
            tile: Side, in pixels, of the tiles that larger pictures are worked on in; None for
                tiles only where a picture cannot be held in memory.

        Raises:
            DatasetError: The data set, its labels, or all of its images cannot be used.
            RunConflictError: ``out`` was made with other settings.
            TrainingError: There is next to nothing to learn from.
            UsageError: ``predict_on`` is given, but nothing is trained; ``tile`` is, and is too
                small, or the preset cannot see in tiles.
            WriteError: ``out`` cannot be written.
        """
        chosen = None if labels is None else Path(labels)
        source = DataRequest(dataset, root=Path(images), split=split, labels=chosen)
        preset = self._preset
        if self._prompts is not None:
            preset = preset.for_dataset(kind_of(dataset, self._prompts))
        maps = CamRequest(
            source, self._asked, preset, command="clipes.PseudoLabeler.run", tile=tile
        )
        others = None if predict_on is None else Path(predict_on)
        request = RunRequest(maps, workers, train, resume=resume, predict_on=others)
        data = open_dataset(
            dataset, root=source.root, split=split, labels=chosen, classes=self.classes
        )
        run, device = Run(Path(out)), choose_device(self._asked.device)
        how = Resources(workers=share_processor(device, workers), batch=batch_size(device, None))

        def make_maps(listener: Listener) -> Outcome:
            words = self._vocabulary
            clip = (
                load_for(maps, words, data, run, how.workers or 1, listener)
                if isinstance(self._loaded, UnknownClassError)
                else self._complete
            )
            summary = maps_with(clip, maps, words, data, run, how, listener)
            return Outcome(summary, data.failures)

        listener = Listener(_log.info, progress=partial(_followed, follow))
        return make_run_of(request, data, make_maps, run, listener, numbered=False)


class Segmenter:
    """Makes masks of images without labels, as ``clipes predict``; ``load_segmenter`` makes one.

    Args:
        predictor: What a checkpoint and its towers say of an image.
        classes: Class names in mask order.
        crf: Settings of the dense CRF that comes last where labels are not known; None for none.
    """

    def __init__(
        self, predictor: LabelPredictor, classes: tuple[str, ...], crf: CrfParams | None
    ) -> None:
        self._predictor = predictor
        self._classes = classes
        self._crf = crf

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; class k has mask value k + 1."""
        return self._classes

    def segment(self, image: Picture, labels: Label | Sequence[Label] | None = None) -> PseudoLabel:
        """Return the mask of an image, and how sure each of its pixels is.

        Args:
            image: A path, a Pillow picture, or an (H, W, 3) RGB uint8 array (OpenCV reads BGR).
            labels: What is in it, names or 0-based indices of ``classes``, where that is known: no
                other class is found then, and each of them is sure somewhere. None for any class.

        Returns:
            mask (H, W) uint8, 0 background, class k as k + 1; confidence (H, W) in [0, 1].

        Raises:
            ImageError: The image cannot be read or used.
            VocabularyError: A label is none of the classes.
            UsageError: ``labels`` is empty.
        """
        if labels is None:
            return label_image(_pixels(image), self._predictor, self._crf)[0]
        # What is known to be there is scaled as maps are, and goes through the CRF of ``relabel``.
        crf = None if self._crf is None else CrfParams().of_segmenter()
        present = _indices(labels, self._classes)
        return label_image(_pixels(image), self._predictor, crf, present)[0]


def load(
    weights: str | Path = "auto",
    classes: Sequence[str] | None = None,
    text_features: str | Path | None = None,
    preset: str | Preset = "default",
    device: str = "auto",
    *,
    model: str = "ViT-B-16",
    prompts: str | Path = "voc",
    looks: str | Path | None = None,
    dino: str | Path = "auto",
    fit: bool = True,
) -> PseudoLabeler:
    """Get CLIP ready to make masks.

    Weights that are not on this machine are fetched. What is used, and why, goes to the logger
    ``clipes``; that class vectors are stand-ins is a warning, which Python shows by itself.

    Args:
        weights: ``auto``, ``openai``, ``registry``, a file, or a pretrained tag of open_clip.
        classes: Class names in mask order; None for those of ``prompts``.
        text_features: An ``.npz`` with class vectors, instead of the text tower.
        preset: ``reference``, ``default``, ``clip`` or ``fast``, with the lambda of the data set
            whose vocabulary ``prompts`` is; or one of your own, which is taken as it is.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        model: Architecture, in open_clip's spelling.
        prompts: Vocabulary with template, synonyms and background words: ``voc``, ``coco``, or a
            TOML file.
        looks: A run folder of ``clipes cam`` on images like yours, with the same classes: what they
            look like there is used here, for better masks. None for each image on its own.
        dino: Weights of DINOv2: ``auto``, ``official``, ``registry`` or a file. Asked for where
            the preset learns with it what classes look like: by ``run``, or with ``looks``.
        fit: Whether ``run`` fits vectors for classes that none is known of, where the weights have
            no text tower; ``segment`` and ``maps`` need vectors that are there.

    Raises:
        ArtifactError: ``looks`` is no such folder, or of other classes or another model.
        WeightsError: There are no such weights, or they cannot be fetched.
        VocabularyError: A class has no vector and none may be fitted, or the vocabulary cannot be
            used.
        UsageError: There is no such preset or device, or ``classes`` is no list.
    """
    if isinstance(classes, str):
        raise UsageError(f"classes is the text {classes[:60]!r}", "give a list: ['cat', 'sofa']")
    chosen, named = preset, None
    if isinstance(chosen, str):
        named = str(prompts)
        chosen = get_preset(chosen).for_dataset(named)
    vocabulary = load_vocabulary(prompts)
    if classes is not None:
        vocabulary = vocabulary.with_classes(tuple(classes))
    features = None if text_features is None else Path(text_features)
    asked = ClipRequest(
        str(weights), model, text_features=features, device=device, dino=str(dino), fit=fit
    )
    clip: Clip | UnknownClassError
    try:
        positions = chosen.cam.fp16_positions
        heard, wide = Listener(_log.info), chosen.cam.wide
        clip = load_clip(asked, vocabulary, heard, fp16_positions=positions, wide=wide)
    except UnknownClassError as error:
        if not fit or features is not None or looks is not None:
            raise
        clip = error
    known = None if looks is None else Path(looks)
    labeler = PseudoLabeler(clip, chosen, vocabulary, asked, known, named)
    if labeler.note:
        _log.warning("class vectors: %s", labeler.note)
    return labeler


def load_segmenter(
    checkpoint: str | Path,
    device: str = "auto",
    dino: str | Path = "auto",
    weights: str | Path = "auto",
) -> Segmenter:
    """Get a trained segmenter ready to make masks, at the scales that its checkpoint says.

    Args:
        checkpoint: A file that ``clipes train-seg`` wrote.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dino: Weights of DINOv2, for segmenters on frozen towers: ``auto``, ``official``,
            ``registry`` or a file.
        weights: CLIP's, likewise: ``auto``, ``openai``, ``registry``, a file, or a pretrained tag
            of open_clip.

    Raises:
        ArtifactError: The checkpoint cannot be used, or was trained on other towers.
        WeightsError: There are no such weights, or they cannot be fetched.
        UsageError: There is no such device.
    """
    saved = load_checkpoint(Path(checkpoint))
    model = saved.build().to(choose_device(device))
    towers = TowerRequest(str(weights), str(dino))
    source = tokens_of(saved.spec, towers, device, Listener(_log.info))
    predictor = predictor_for(model, saved.test, source)
    return Segmenter(predictor, saved.spec.classes, saved.spec.crf_of(saved.test))


def _pixels(image: Picture) -> UInt8Array:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_pixels(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        if image.size:
            return image
        raise ImageError(f"an image of shape {image.shape} has no pixels")
    shown = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
    raise ImageError(
        f"an image that is {shown}", "give a path, a Pillow picture, or (H, W, 3) RGB uint8"
    )


def _indices(labels: Label | Sequence[Label], classes: tuple[str, ...]) -> list[int]:
    """Return 0-based indices, each once, in the order given."""
    given = [labels] if isinstance(labels, str | int | np.integer) else labels
    found = list(dict.fromkeys(_index(label, classes) for label in given))
    if not found:
        raise UsageError("no labels", "give at least one class that the image shows")
    return found


def _index(label: Label, classes: tuple[str, ...]) -> int:
    try:
        if isinstance(label, str):
            return class_index(label, classes)
        index = operator.index(label)
    except ProblemError as error:
        raise VocabularyError(error.what, error.remedy) from error
    except TypeError as error:
        raise VocabularyError(
            f"the label {label!r} is neither a name nor a whole number", "give class names"
        ) from error
    if not 0 <= index < len(classes):
        raise VocabularyError(
            f"there is no class {index}", f"indices go from 0 to {len(classes) - 1}, or give names"
        )
    return index


@contextmanager
def _followed(
    follow: Follow | None, what: str, /, *, show_count: bool = True
) -> Iterator[Progress]:
    yield lambda done, total: None if follow is None else follow(what, done, total)
