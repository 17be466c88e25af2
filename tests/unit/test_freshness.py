"""What a file was made from decides whether it is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipes.config import CrfParams
from clipes.disk.images import read_mask, write_confidence, write_mask
from clipes.run import origin
from clipes.run.folder import Run
from clipes.run.freshness import Freshness, looks_digest
from clipes.run.origin import MapsOrigin, MaskOrigin, Picture, maps_settings, read_picture
from clipes.run.record import RefineSettings
from clipes.stages.refine import RefineResources, make_masks
from clipes.types import CamMaps, PseudoLabel, Sample
from tests.heard import Heard

CLASSES = ("cat", "dog", "sofa")
CAM = {"preset": {"cam": {"strong": 0.5}}, "precision": "fp32", "weights": {}, "text": {}}
CRF = {"crf": {"iterations": 5}}
OLD = 1_600_000_000 * 10**9


@dataclass
class Made:
    """A run of one image, and what it was made from."""

    run: Run
    sample: Sample

    def now(self, **changed: object) -> Freshness:
        asked = {"cam": CAM, "looks": "l", "refine": CRF, **changed}
        return Freshness(self.run, CLASSES, **asked)

    def save_maps(self, current: Freshness) -> None:
        _, picture = read_picture(self.sample.image)
        maps = np.ones((len(self.sample.labels), 2, 2), np.float32)
        cams = CamMaps(np.array(self.sample.labels), maps, (8, 9))
        line = current.maps_origin(self.sample, picture).text()
        self.run.save_cams(self.sample.id, cams, origin=line)

    def save_mask(self, *, origin: bool = True) -> None:
        pseudo = PseudoLabel(np.ones((8, 9), np.uint8), np.ones((8, 9), np.float32))
        line = MaskOrigin.of(self.run.maps_origin("a"), CRF).text() if origin else ""
        self.run.save_pseudo("a", pseudo, origin=line)


def write_picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (shade, shade, shade)).save(path, format="BMP")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    write_picture(tmp_path / "photos" / "a.bmp", 10)
    made = Made(Run(tmp_path / "run"), Sample("a", tmp_path / "photos" / "a.bmp", (1, 0)))
    made.save_maps(made.now())
    made.save_mask()
    return made


def date(path: Path, nanoseconds: int) -> None:
    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_what_has_not_changed_is_done(made: Made) -> None:
    current = made.now()
    assert current.has_maps(made.sample)
    assert current.has_pseudo(made.sample)
    assert current.has_maps(replace(made.sample, labels=(0, 1)))  # their order changes nothing
    assert not current.is_edited(made.sample)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((0,), "made for cat and dog, its labels are cat"),
        ((1, 2), "made for cat and dog, its labels are dog and sofa"),
        ((0, 1, 2), "its labels are cat and dog and sofa"),
    ],
)
def test_other_labels_are_named(made: Made, labels: tuple[int, ...], said: str) -> None:
    relabelled = replace(made.sample, labels=labels)
    assert said in made.now().maps(relabelled)
    assert not made.now().has_pseudo(relabelled)
    assert made.now().unusable(relabelled).endswith("'clipes refine' again")


def replaced_in_place(path: Path) -> None:
    write_picture(path, 11)


def replaced_with_its_dates(path: Path) -> None:
    before = path.stat()
    write_picture(path, 11)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def an_older_file_moved_there(path: Path) -> None:
    other = path.with_name("other.bmp")
    write_picture(other, 11)
    date(other, OLD)
    other.replace(path)


def a_link_to_an_older_file(path: Path) -> None:
    other = path.with_name("other.bmp")
    write_picture(other, 11)
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize(
    "change",
    [
        replaced_in_place,
        replaced_with_its_dates,
        an_older_file_moved_there,
        a_link_to_an_older_file,
    ],
)
def test_another_picture_of_the_same_size_is_noticed(
    made: Made, change: Callable[[Path], None]
) -> None:
    size = made.sample.image.stat().st_size
    change(made.sample.image)
    assert made.sample.image.stat().st_size == size
    assert "another picture" in made.now().maps(made.sample)


def test_a_data_set_that_was_moved_is_read_once(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    whole = origin.sha256_of
    monkeypatch.setattr(origin, "sha256_of", lambda path: read.append(path) or whole(path))
    monkeypatch.setattr(origin, "_COARSE", 0)
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere")
    moved = replace(made.sample, image=tmp_path / "elsewhere" / "a.bmp")
    assert made.now().has_maps(moved)
    assert read == [moved.image]
    assert made.now().has_maps(moved)
    assert made.now().has_pseudo(moved)
    assert read == [moved.image]


def test_a_picture_that_is_gone_is_left_to_who_reads_it(made: Made) -> None:
    made.sample.image.unlink()
    assert made.now().maps(made.sample) == ""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cam": {**CAM, "weights": {"sha256": "1"}}}, "other settings, weights or words"),
        ({"cam": {**CAM, "text": {"sha256": "1"}}}, "other settings, weights or words"),
        ({"cam": {**CAM, "precision": "bf16"}}, "other settings, weights or words"),
        ({"cam": {**CAM, "preset": {"cam": {}}}}, "other settings, weights or words"),
        ({"looks": "m"}, "learnt anew"),
    ],
)
def test_maps_of_another_tower_settings_or_looks_are_not_done(
    made: Made, changed: dict, said: str
) -> None:
    assert said in made.now(**changed).maps(made.sample)


def test_where_images_come_from_and_the_crf_do_not_change_maps(made: Made) -> None:
    preset = {**CAM["preset"], "crf": {"iterations": 9}, "name": "mine"}
    others = {**CAM, "preset": preset, "split": "val", "labels": "x.csv"}
    assert maps_settings(others) == maps_settings(CAM)
    assert made.now(looks=None).has_maps(made.sample)  # what they look like is not known any more


def test_a_mask_follows_its_maps_and_its_settings(made: Made) -> None:
    assert "other settings of the CRF" in made.now(refine={"crf": {}}).mask(made.sample)
    assert made.now(refine=None).has_pseudo(made.sample)
    made.sample = replace(made.sample, labels=(2,))
    made.save_maps(made.now())
    assert made.now().has_maps(made.sample)
    assert made.now().mask(made.sample) == "its mask was made from other maps than there are now"
    made.save_mask()
    assert made.now().has_pseudo(made.sample)


def test_maps_made_again_from_the_same_leave_the_mask_as_it_is(made: Made) -> None:
    made.save_maps(made.now())
    assert made.now().has_pseudo(made.sample)


def test_an_edited_mask_stays_done_until_its_maps_change(made: Made) -> None:
    path = made.run.pseudo_path("a")
    write_mask(path, read_mask(path) + np.uint8(1))
    assert made.now().is_edited(made.sample)
    assert made.now().has_pseudo(made.sample)
    made.sample = replace(made.sample, labels=(2,))
    made.save_maps(made.now())
    assert made.now().mask(made.sample).endswith("and was edited since")
    advice = f"and was edited since: {path}; it may be a person's work: delete it"
    assert advice in made.now().unusable(made.sample)
    write_mask(path, read_mask(path), origin=MaskOrigin("other", "settings").text())
    assert (
        made.now().unusable(made.sample).endswith("than there are now; run 'clipes refine' again")
    )


def test_a_mask_beside_the_confidence_map_of_another_making_is_made_again(made: Made) -> None:
    mask = made.run.pseudo_path("a").read_bytes()
    other = MaskOrigin.of(made.run.maps_origin("a"), {"crf": {"iterations": 9}}).text()
    sure = np.full((8, 9), 0.5, np.float32)
    write_confidence(made.run.confidence_path("a"), sure, origin=other)  # and then it was killed
    assert made.run.pseudo_path("a").read_bytes() == mask
    assert not made.now().has_pseudo(made.sample)
    assert not made.now().is_edited(made.sample)
    told = "its mask and its confidence map were not made together; run 'clipes refine' again"
    assert made.now().unusable(made.sample) == told
    made.save_mask()
    assert made.now().has_pseudo(made.sample)
    write_confidence(made.run.confidence_path("a"), sure)  # a person's says nothing
    assert made.now().has_pseudo(made.sample)


def test_files_of_an_older_version_are_compared_by_labels_and_age(made: Made) -> None:
    cams = made.run.load_cams("a")
    made.run.save_cams("a", cams)
    made.save_mask(origin=False)
    current = made.now()
    assert current.has_pseudo(made.sample)
    assert "made for cat and dog" in current.maps(replace(made.sample, labels=(0,)))
    made.save_maps(current)
    date(made.run.pseudo_path("a"), OLD)
    assert "does not say what it was made from" in made.now().mask(made.sample)


def test_damage_is_left_to_who_reads_it(made: Made) -> None:
    made.run.cams_path("a").write_bytes(b"no archive")
    made.run.pseudo_path("a").write_bytes(b"no picture")
    assert made.now().maps(made.sample) == ""
    assert made.now().has_maps(made.sample)
    made.run.cams_path("a").unlink()
    assert not made.now().has_maps(made.sample)


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"image": 1}', "[" * 100_000, '{"a": 1}'])
def test_an_origin_that_is_none_of_ours_is_none(text: str) -> None:
    assert MapsOrigin.parse(text) is None
    assert MaskOrigin.parse(text) is None


def test_origins_come_back(made: Made) -> None:
    maps = MapsOrigin("ab", 12, (0, 3), "s", "")
    assert MapsOrigin.parse(maps.text()) == maps
    assert (
        made.run.maps_origin("a")
        == made.now().maps_origin(made.sample, Picture.of(made.sample.image)).text()
    )
    assert made.run.maps_origin("absent") == ""


def test_the_same_inputs_make_the_same_bytes(made: Made, tmp_path: Path) -> None:
    before = [path.read_bytes() for path in (made.run.cams_path("a"), made.run.pseudo_path("a"))]
    date(made.sample.image, OLD)
    again = Made(Run(tmp_path / "again"), made.sample)
    again.save_maps(again.now())
    again.save_mask()
    assert [
        path.read_bytes() for path in (again.run.cams_path("a"), again.run.pseudo_path("a"))
    ] == before


def test_the_digest_of_what_classes_look_like(made: Made) -> None:
    assert looks_digest(made.run) is None
    path = made.run.looks_path
    path.parent.mkdir()
    arrays = {name: np.zeros((2, 2)) for name in ("sums", "mass", "moment")}
    np.savez(path, **arrays, ids=np.array(["a"]))
    before = looks_digest(made.run)
    np.savez(path, **arrays, ids=np.array(["a"]), labels=np.array(["0"]))
    assert looks_digest(made.run) == before
    np.savez(path, **arrays | {"mass": np.ones((2, 2))}, ids=np.array(["a"]))
    assert looks_digest(made.run) != before


def test_maps_made_again_while_they_are_read_fail_that_image(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run.pseudo_path("a").unlink()
    load = Run.load_cams

    def meanwhile(run: Run, image_id: str, **more: int) -> CamMaps:
        cams = load(run, image_id, **more)
        made.save_maps(made.now(looks="other"))
        return cams

    monkeypatch.setattr(Run, "load_cams", meanwhile)
    heard = Heard()
    settings, alone = RefineSettings(CrfParams(), 1.0), RefineResources(backend="threading")
    make_masks([made.sample], made.run, settings, made.now(), alone, heard.listener)
    assert [failure.reason for failure in heard.failures] == [
        "its maps were made again while they were read; run the same command again"
    ]
    assert not made.run.has_pseudo("a")
