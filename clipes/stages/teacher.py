"""Frozen CLIP and the words of a run, for segmenters that are trained with both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from clipes.choices import DatasetKind, Fusion
from clipes.config import WeakClipPreset, WeClipPlusPreset, WeClipPreset
from clipes.errors import ArtifactError, VocabularyError
from clipes.listener import Listener
from clipes.maps.vectors import BACKGROUND_REMEDY, WordVectors
from clipes.run.folder import Run
from clipes.run.record import CamRecord, TextUsed
from clipes.seg.weakclip import BACKGROUND, token_names
from clipes.seg.weakclip_recipe import SpeakingTowers
from clipes.seg.weclip_labels import PlusTeacher, Teacher
from clipes.stages.setup import OpenedWeights, load_dino
from clipes.stages.token_source import TowerRequest, open_clip, tokens_with
from clipes.towers.clip_text import ContextEncoder
from clipes.towers.load import has_text, load_text
from clipes.towers.side_by_side import CLIP, DINO
from clipes.weights import cache_dir
from clipes.words.encode import fingerprint, text_features
from clipes.words.features import TextFeatures, fuse_vectors
from clipes.words.vocabulary import SHIPPED, Vocabulary, load_vocabulary


def open_teacher(
    run: Run, preset: WeClipPreset, request: TowerRequest, device: str, listener: Listener
) -> Teacher:
    """Load CLIP, for WeCLIP+ DINOv2 as well, and make the vectors of a run's words again.

    Args:
        run: The run whose words are meant.
        preset: Says what colours CLIP sees, and which method is meant.
        request: Where the weights come from.
        device: ``auto`` or a torch device.
        listener: Told what is used.

    Raises:
        ArtifactError: The words cannot be told from what run.json says.
        WeightsError: The weights cannot be had.
        VocabularyError: The vectors of a class cannot be had.
    """
    opened = open_clip(preset.normalise, request, device, listener)
    clip, recipe = opened.backbone(fp16_positions=True), opened.weights.recipe
    text = _words(run, opened, listener)
    vectors = WordVectors(text, opened.device, clip.visual.proj.dtype)
    digests = {CLIP: opened.weights.sha256}
    if not isinstance(preset, WeClipPlusPreset):
        return Teacher(clip, vectors, recipe.mean, recipe.std, digests)
    dino = load_dino(request.dino, device, listener)
    digests[DINO] = dino.digest
    return PlusTeacher(clip, vectors, recipe.mean, recipe.std, digests, dino)


def open_speaking(
    run: Run,
    classes: tuple[str, ...],
    preset: WeakClipPreset,
    request: TowerRequest,
    device: str,
    listener: Listener,
) -> SpeakingTowers:
    """Load CLIP with its text tower, or with the vectors of a run's words if it has none.

    A preset that reads another tower gets that one, too.

    Args:
        run: The run whose words are meant.
        classes: Class names in mask order.
        preset: Says what is read of CLIP, and in what colours.
        request: Where the weights come from.
        device: ``auto`` or a torch device.
        listener: Told what is used.

    Raises:
        ArtifactError: The words cannot be told from what run.json says, or none is background.
        WeightsError: The weights cannot be had.
        VocabularyError: The vectors of a class cannot be had.
    """
    opened = open_clip(preset.normalise, request, device, listener)
    names = token_names(preset.blocks, preset.beside)
    source = tokens_with(opened, names, preset.max_patches, request, device, listener)
    recipe = opened.weights.recipe
    colours = (recipe.mean, recipe.std)
    if preset.contexts and has_text(opened.state):
        tower = load_text(opened.state, quick_gelu=recipe.quick_gelu).to(opened.device)
        note = f"words: {preset.contexts} learnt vectors before each name"
        return SpeakingTowers(source, ContextEncoder(tower, (BACKGROUND, *classes)), colours, note)
    text = _words(run, opened, listener)
    note = "words: the run's vectors through a learnt map, for want of a text tower"
    if has_text(opened.state):
        note = "words: the run's vectors through a learnt map"
    return SpeakingTowers(source, _with_background(text, run), colours, note)


def _with_background(text: TextFeatures, run: Run) -> torch.Tensor:
    """Return (1 + C, E) vectors of length 1; the first is the mean of the background words'."""
    if not text.background_words:
        raise ArtifactError(
            f"the words of {run.root} have none for the background",
            BACKGROUND_REMEDY,
        )
    background = fuse_vectors(text.background_vectors)
    return torch.from_numpy(np.concatenate([background[None], text.class_vectors]))


def _words(run: Run, opened: OpenedWeights, listener: Listener) -> TextFeatures:
    """Return the vectors that a run's maps were made with."""
    record = run.cam_record()
    used, asked = record.settings.text or TextUsed(""), record.facts.asked or {}
    file = run.words_path if record.facts.fitted else asked.get("text_features")
    encoded = file is None and has_text(opened.state)
    errors: list[VocabularyError] = []
    for vocabulary in _vocabularies(record):
        try:
            text = text_features(
                vocabulary,
                opened.state,
                opened.weights,
                file=Path(file) if file else None,
                cache=cache_dir(),
                say=listener.say,
                fusion=Fusion(used.fusion),
                templates=used.templates if encoded else (),
                descriptions=used.descriptions,
                wide=True,
            )
        except VocabularyError as error:  # such as descriptions that only the other words have
            errors.append(error)
            continue
        # Neither preset reference nor an older clipes has further background words.
        for made_with in (text, text.without_words(vocabulary.more_background)):
            if fingerprint(made_with) == used.sha256:
                return made_with
    if len(errors) == len(SHIPPED):
        raise errors[0]
    raise ArtifactError(
        f"the words that {run.root} was made with are not to be had again",
        "give --weights as for 'clipes cam'; words of one's own (--prompts) are known only if "
        "they came as --text-features",
    )


def _vocabularies(record: CamRecord) -> Iterator[Vocabulary]:
    """Yield the words that a run may have: its data set's, then the other shipped ones."""
    settings = record.settings
    own = DatasetKind.coco if settings.dataset == DatasetKind.coco else DatasetKind.voc
    for name in sorted(SHIPPED, key=lambda name: name != own.value):
        words = load_vocabulary(name)
        same = words.classes == settings.classes
        yield words if same else words.with_classes(settings.classes)
