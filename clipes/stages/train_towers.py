"""The frozen towers that a training asks, loaded when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

from clipes.config import AnySegmenterPreset, FrozenPreset, WeakClipPreset, WeClipPreset
from clipes.listener import Listener
from clipes.run.tokens import CachedTokens
from clipes.seg.weakclip_recipe import SpeakingTowers
from clipes.seg.weclip_labels import Teacher
from clipes.stages.teacher import open_speaking, open_teacher
from clipes.stages.token_source import open_tokens
from clipes.stages.train_request import TrainRequest
from clipes.towers.tokens import TokenSource


@dataclass(frozen=True)
class TrainTowers:
    """What a preset's training asks of towers.

    Attributes:
        request: What is asked for.
        preset: The preset that is trained.
        classes: Class names in mask order.
        device: A torch device.
        processes: How many train together.
        listener: Told what is used.
    """

    request: TrainRequest
    preset: AnySegmenterPreset
    classes: tuple[str, ...]
    device: str
    processes: int
    listener: Listener

    def tokens(self) -> CachedTokens | None:
        """Return where tokens of whole images come from, for presets that learn from these."""
        if (open_source := self._token_source()) is None:
            return None
        folder = self.request.sources.run.root / "tokens"
        return CachedTokens(open_source, folder, self.request.token_space, self.processes)

    def _token_source(self) -> Callable[[], TokenSource] | None:
        preset, speaking = self.preset, self.speaking
        if isinstance(preset, FrozenPreset):
            return partial(
                open_tokens,
                preset.tokens,
                preset.max_patches,
                self.request.towers,
                self.device,
                self.listener,
                otherwise="or take --preset frozen-clip, which does with CLIP alone",
            )
        if isinstance(preset, WeakClipPreset) and not preset.crop and speaking is not None:
            return lambda: speaking().source
        return None

    @cached_property
    def speaking(self) -> Callable[[], SpeakingTowers] | None:
        """What loads CLIP and the run's words once, for presets that match both."""
        preset, request = self.preset, self.request
        if not isinstance(preset, WeakClipPreset):
            return None
        run = request.sources.run
        return cache(
            partial(
                open_speaking,
                run,
                self.classes,
                preset,
                request.towers,
                self.device,
                self.listener,
            )
        )

    def teacher(self) -> Callable[[], Teacher] | None:
        """Return what loads CLIP and the run's words, for presets whose labels they make."""
        preset, request = self.preset, self.request
        if not isinstance(preset, WeClipPreset):
            return None
        run = request.sources.run
        return partial(open_teacher, run, preset, request.towers, self.device, self.listener)
