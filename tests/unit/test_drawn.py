"""What a person's mask says of patches, and which masks are learnt from and noticed to change."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipes.disk.images import write_mask
from clipes.maps.drawn import MOST_OF, drawn_shares, shown_in
from clipes.run.corrected import Chosen
from clipes.run.freshness import Freshness
from clipes.run.origin import Picture
from clipes.run.reopen import reopen
from clipes.stages.drawn_masks import DrawnMasks
from clipes.stages.looks_sources import Source, count_changed, read_sources, write_sources
from clipes.types import IGNORE, PseudoLabel, Sample
from tests.report_support import CLASSES, Made, make_run


def test_shares_are_those_of_the_pixels_of_a_patch() -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 1, 7, IGNORE], np.uint8), (32, 48))
    mask[:16, :16] = 7
    mask[16:, :16] = IGNORE
    shares = drawn_shares(mask, (2, 3))
    assert list(shares) == [0, 1, 7]
    for value, share in shares.items():
        cells = (mask == value).reshape(2, 16, 3, 16).mean((1, 3)).ravel()
        np.testing.assert_allclose(share, cells, atol=1 / 255)
    assert shares[7][0] == 1
    assert sum(share[3] for share in shares.values()) == 0


def test_patches_need_not_be_whole_pixels() -> None:
    mask = np.zeros((50, 70), np.uint8)
    mask[:, 35:] = 3
    shares = drawn_shares(mask, (4, 6))
    np.testing.assert_allclose(shares[0] + shares[3], 1, atol=2 / 255)
    assert shares[3].reshape(4, 6).mean(0).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_mask_of_nothing_but_255_says_nothing() -> None:
    assert drawn_shares(np.full((8, 8), IGNORE, np.uint8), (2, 2)) == {}


def test_a_patch_shows_what_most_of_it_is() -> None:
    shares = {0: np.array([0.2, 1, MOST_OF], np.float32), 4: np.array([0.7, 0, 0.25], np.float32)}
    shown = shown_in(shares)
    assert {value: here.tolist() for value, here in shown.items()} == {
        0: [False, True, True],
        4: [False, False, False],
    }


# Which masks there are


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = make_run(tmp_path, {"a": (0,), "b": (1,), "c": (2,)})
    correct(made, "b", made.truth["b"])
    return made


def correct(made: Made, id_: str, mask: np.ndarray) -> None:
    sure = PseudoLabel(mask, np.ones(mask.shape, np.float32))
    made.run.corrected.save_pseudo(id_, sure)


def drawn(made: Made, *, corrected: bool = True) -> DrawnMasks:
    return DrawnMasks(Chosen(made.run, Freshness.of(made.run, CLASSES), corrected), len(CLASSES))


def samples(made: Made) -> dict[str, Sample]:
    return {sample.id: sample for sample in reopen(made.run, None).samples}


def test_a_person_s_mask_is_read_where_there_is_one(made: Made) -> None:
    said: list[str] = []
    masks, found = drawn(made), samples(made)
    np.testing.assert_array_equal(masks.read(found["b"], said.append), made.truth["b"])
    assert masks.read(found["a"], said.append) is None
    assert drawn(made, corrected=False).read(found["b"], said.append) is None
    assert said == []


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (np.zeros((9, 9), np.uint8), "the corrected mask is 9 x 9, the image 48 x 64"),
        (np.full((48, 64), 9, np.uint8), "the corrected mask holds label 9"),
        (None, "is no PNG"),
    ],
)
def test_a_mask_that_cannot_be_used_is_told(made: Made, mask: np.ndarray | None, told: str) -> None:
    said: list[str] = []
    if mask is None:
        made.run.corrected.pseudo_path("b").write_bytes(b"no picture")
    else:
        correct(made, "b", mask)
    assert drawn(made).read(samples(made)["b"], said.append) is None
    (line,) = said
    assert line.startswith("b: nothing is learnt from its corrected mask: ")
    assert told in line


def sources(made: Made, masks: DrawnMasks) -> list[Source]:
    return [
        Source(one.id, one.labels, Picture.of(one.image), masks.file(one))
        for one in samples(made).values()
    ]


def changed(made: Made, learnt: list[Source], **how: bool) -> int:
    """How many have changed since a file of ten seconds ago that holds them."""
    path = made.run.root / "looks.npz"
    path.write_bytes(b"")
    before = time.time_ns() - 10**10
    os.utime(path, ns=(before, before))
    arrays = write_sources(learnt)
    return count_changed(
        read_sources(arrays) or [], [*samples(made).values()], path, drawn(made, **how)
    )


def test_sources_know_the_masks_that_were_learnt_from(made: Made) -> None:
    learnt = sources(made, drawn(made))
    assert [source.mask is not None for source in learnt] == [False, True, False]
    again = read_sources(write_sources(learnt))
    assert again is not None
    assert [(one.mask and one.mask.sha256) for one in again] == [
        one.mask and one.mask.sha256 for one in learnt
    ]
    older = write_sources([replace(source, mask=None) for source in learnt])
    assert set(older) == {"ids", "labels", "pictures", "bytes"}


def test_masks_that_came_changed_or_went_are_noticed(made: Made) -> None:
    learnt = sources(made, drawn(made))
    assert changed(made, learnt) == 0
    assert changed(made, learnt, corrected=False) == 1
    correct(made, "a", made.truth["a"])
    assert changed(made, learnt) == 1
    correct(made, "b", made.truth["c"])
    assert changed(made, learnt) == 2
    made.run.corrected.pseudo_path("a").unlink()
    correct(made, "b", made.truth["b"])
    assert changed(made, learnt) == 0  # the same bytes, if younger
    made.run.corrected.pseudo_path("b").unlink()
    assert changed(made, learnt) == 1
    without = sources(made, drawn(made, corrected=False))
    assert changed(made, without) == 0


def test_a_mask_that_cannot_be_used_is_not_learnt_anew_at_every_command(made: Made) -> None:
    write_mask(made.run.corrected.pseudo_path("b"), np.zeros((9, 9), np.uint8))
    learnt = sources(made, drawn(made))
    assert changed(made, learnt) == 0
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(samples(made)["b"].image)
    assert changed(made, learnt) == 1
