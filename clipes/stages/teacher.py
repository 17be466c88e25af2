"""Frozen CLIP and the words of a run, for a segmenter whose labels are made as it learns."""

from __future__ import annotations

from pathlib import Path

from clipes.choices import DatasetKind, Fusion
from clipes.config import WeClipPreset
from clipes.errors import ArtifactError
from clipes.listener import Listener
from clipes.maps.vectors import WordVectors
from clipes.run.folder import Run
from clipes.run.record import CamRecord, TextUsed
from clipes.seg.weclip_labels import Teacher
from clipes.stages.setup import OpenedWeights
from clipes.stages.token_source import TowerRequest, open_clip
from clipes.towers.load import has_text
from clipes.towers.side_by_side import CLIP
from clipes.weights import cache_dir
from clipes.words.encode import fingerprint, text_features
from clipes.words.features import TextFeatures
from clipes.words.vocabulary import Vocabulary, load_vocabulary


def open_teacher(
    run: Run, preset: WeClipPreset, request: TowerRequest, device: str, listener: Listener
) -> Teacher:
    """Load CLIP, and make the vectors of a run's words again.

    Args:
        run: The run whose words are meant.
        preset: Says what colours CLIP sees.
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
    return Teacher(clip, vectors, recipe.mean, recipe.std, digests)


def _words(run: Run, opened: OpenedWeights, listener: Listener) -> TextFeatures:
    """Return the vectors that a run's maps were made with."""
    record = run.cam_record()
    used, asked = record.settings.text or TextUsed(""), record.facts.asked or {}
    file = asked.get("text_features")
    encoded = file is None and has_text(opened.state)
    text = text_features(
        _vocabulary(record),
        opened.state,
        opened.weights,
        file=Path(file) if file else None,
        cache=cache_dir(),
        say=listener.say,
        fusion=Fusion(used.fusion),
        templates=used.templates if encoded else (),
    )
    if fingerprint(text) != used.sha256:
        raise ArtifactError(
            f"the words that {run.root} was made with are not to be had again",
            "give --weights as for 'clipes cam'; words of one's own (--prompts) are known only if "
            "they came as --text-features",
        )
    return text


def _vocabulary(record: CamRecord) -> Vocabulary:
    """Return the words that a run has unless others were named."""
    settings = record.settings
    coco = settings.dataset == DatasetKind.coco
    words = load_vocabulary((DatasetKind.coco if coco else DatasetKind.voc).value)
    return words if words.classes == settings.classes else words.with_classes(settings.classes)
