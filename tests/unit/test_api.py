"""The package from Python: three lines give the masks that the command line writes."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clipes
from clipes.config import Preset, get_preset
from clipes.datasets import Dataset
from clipes.disk.images import read_image
from clipes.errors import (
    ArtifactError,
    ImageError,
    UnknownClassError,
    UsageError,
    VocabularyError,
)
from clipes.listener import Listener
from clipes.maps.maker import CamMaker
from clipes.masks.pseudo import pseudo_label
from clipes.run.folder import Run
from clipes.stages.cam import CamRequest, ClipRequest, DataRequest, Resources, cam
from clipes.stages.images import ImageSource
from clipes.stages.learn_looks import learn_looks
from clipes.stages.run import RunRequest
from clipes.stages.setup import Clip, load_clip, that_tags
from clipes.stages.tag import tag_images
from clipes.types import Sample
from clipes.words.encode import fingerprint
from clipes.words.vocabulary import load_vocabulary
from tests.cli.small_data import CLASSES as SMALL_CLASSES
from tests.cli.small_data import write_clip, write_photos
from tests.dino_support import write_dino

CLASSES = ["cat", "sofa", "dog"]


@pytest.fixture(scope="module")
def labeler(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> clipes.PseudoLabeler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPES_CACHE", str(tmp_path_factory.mktemp("cache")))
        dino = write_dino(tmp_path_factory.mktemp("dino") / "tiny.safetensors")
        return clipes.load(tiny_weights, CLASSES, device="cpu", dino=dino)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((104, 72)).save(path)
    return path


def test_three_lines(labeler: clipes.PseudoLabeler, photo: Path, tmp_path: Path) -> None:
    pseudo = labeler.segment(photo, ["dog", "cat"])
    assert pseudo.mask.shape == pseudo.confidence.shape == (72, 104)
    assert pseudo.mask.dtype == np.uint8
    assert set(np.unique(pseudo.mask)) <= {0, 1, 3}
    clipes.write_mask(str(tmp_path / "mask.png"), pseudo.mask)
    np.testing.assert_array_equal(clipes.read_mask(str(tmp_path / "mask.png")), pseudo.mask)


def test_it_does_what_the_stages_do(labeler: clipes.PseudoLabeler, photo: Path) -> None:
    maps = labeler.maps(photo, ["cat"])
    assert maps.labels.tolist() == [0]
    assert maps.size == (72, 104)
    expected = pseudo_label(read_image(photo), maps, get_preset("default").crf)
    for pseudo in (labeler.segment(photo, ["cat"]), labeler.refine(photo, maps)):
        np.testing.assert_array_equal(pseudo.mask, expected.mask)
        np.testing.assert_array_equal(pseudo.confidence, expected.confidence)


def test_every_way_to_give_an_image_is_the_same(labeler: clipes.PseudoLabeler, photo: Path) -> None:
    pixels = read_image(photo)
    with Image.open(photo) as picture:
        ways = (str(photo), picture, pixels, picture.convert("RGBA"))
        found = [labeler.maps(way, "cat").maps for way in ways]
    for maps in found:
        np.testing.assert_array_equal(maps, labeler.maps(photo, "cat").maps)


def test_a_turned_picture_is_taken_upright(labeler: clipes.PseudoLabeler, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        assert labeler.maps(picture, "cat").size == (40, 24)
    assert labeler.maps(tmp_path / "turned.png", "cat").size == (40, 24)


@pytest.mark.parametrize(
    "labels", [["dog", "cat"], [2, 0], ("dog", 0), np.array([2, 0]), ["dog", "dog", 0, "cat"]]
)
def test_every_way_to_give_labels_is_the_same(
    labeler: clipes.PseudoLabeler, photo: Path, labels: object
) -> None:
    assert labeler.maps(photo, labels).labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cta"], r"unknown class 'cta'; did you mean 'cat'\?"),
        ([3], "there is no class 3; indices go from 0 to 2"),
        ([-1], "there is no class -1"),
        ([0.5], "neither a name nor a whole number"),
        ([None], "neither a name nor a whole number"),
    ],
)
def test_labels_that_are_none_are_named(
    labeler: clipes.PseudoLabeler, photo: Path, labels: list, message: str
) -> None:
    with pytest.raises(VocabularyError, match=message):
        labeler.segment(photo, labels)


def test_no_label_is_an_error(labeler: clipes.PseudoLabeler, photo: Path) -> None:
    with pytest.raises(UsageError, match="at least one class"):
        labeler.segment(photo, [])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("F", (4, 4)),
        Image.new("RGB", (0, 4)),
        "nowhere.jpg",
        None,
    ],
)
def test_images_that_are_none_are_refused(labeler: clipes.PseudoLabeler, image: object) -> None:
    with pytest.raises(ImageError):
        labeler.segment(image, ["cat"])


def test_a_truncated_picture_is_an_image_error(labeler: clipes.PseudoLabeler, photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:300])
    with Image.open(photo) as picture, pytest.raises(ImageError, match="cannot read the picture"):
        labeler.segment(picture, ["cat"])


def test_maps_of_another_image_are_refused(labeler: clipes.PseudoLabeler, photo: Path) -> None:
    maps = labeler.maps(photo, "cat")
    with pytest.raises(ImageError, match="its maps were made at"):
        labeler.refine(np.zeros((10, 10, 3), np.uint8), maps)


def test_loading_tells_a_logger_and_needs_a_list(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("clipes")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        loaded = clipes.load(tiny_weights, ["cat"], preset=get_preset("fast"), device="cpu")
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    assert loaded.classes == ("cat",)
    assert loaded.preset.name == "fast"
    assert loaded.note == ""
    assert any("encoding" in message for message in messages)
    with pytest.raises(UsageError, match="give a list"):
        clipes.load(tiny_weights, "cat")
    with pytest.raises(UsageError, match="unknown preset"):
        clipes.load(tiny_weights, preset="nonsense")


def test_vectors_of_a_file_are_used_and_their_note_is_a_warning(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path))
    vectors = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    path = tmp_path / "text.npz"
    names, background = np.array(["cat", "dog", "sky"]), np.array([False, False, True])
    np.savez(
        path, names=names, features=vectors, background=background, model="tiny", note="made up"
    )
    loaded = clipes.load(tiny_weights, ["dog", "cat"], str(path), device="cpu")
    assert loaded.classes == ("dog", "cat")
    assert loaded.note == "made up"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == ["class vectors: made up"]


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, clipes; heavy = {'torch', 'numpy', 'cv2', 'numba', 'PIL', 'typer'};"
        "print(heavy & set(sys.modules), sorted(dir(clipes)) == sorted(clipes.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() True"


def test_every_name_of_the_package_is_there() -> None:
    assert all(getattr(clipes, name) is not None for name in clipes.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = clipes.nonsense


def test_what_the_classes_look_like_in_a_run_is_used(
    labeler: clipes.PseudoLabeler, photo: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    samples = []
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        path = tmp_path / f"{seed}.png"
        Image.fromarray(pixels).resize((144, 128)).save(path)
        samples.append(Sample(path.stem, path, (0, 2), None))
    run, params = Run(tmp_path / "run"), labeler.preset.cam
    maker = CamMaker(labeler._complete.towers, labeler._clip.text, params)
    nothing_kept = ImageSource(None)
    learnt, _ = learn_looks(
        samples, maker, run, params.patches, nothing_kept, Listener(), workers=1
    )
    load = partial(clipes.load, tiny_weights, device="cpu", dino=labeler._asked.dino)
    informed = load(CLASSES, looks=run.root)
    pixels = read_image(photo)
    got = informed.maps(photo, ["dog", "cat"]).maps
    np.testing.assert_array_equal(got, learnt(pixels, [2, 0]).maps)
    alone = labeler.maps(photo, ["dog", "cat"]).maps
    assert got.shape == (2, 8, 10), "a closer look"
    assert alone.shape == (2, 5, 7), "without a second tower there is none"
    assert np.abs(got.mean((1, 2)) - alone.mean((1, 2))).max() > 0.01
    with pytest.raises(ArtifactError, match="other classes or another model"):
        load(CLASSES[:2], looks=run.root)
    with pytest.raises(ArtifactError, match="cannot read"):
        load(CLASSES, looks=tmp_path)
    with pytest.raises(UsageError, match="no use for looks"):
        load(CLASSES, looks=run.root, preset="reference")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four photos with labels, one of them broken."""
    root = tmp_path / "my-photos"
    (root / "images").mkdir(parents=True)
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 64)).save(root / "images" / f"{seed}.png")
    (root / "images" / "3.png").write_bytes(b"no picture")
    (root / "labels.csv").write_text(
        "image,labels\n0.png,cat\n1.png,dog;cat\n2.png,sofa\n3.png,cat\n"
    )
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def test_a_folder_is_done_as_the_command_line_does_it_and_only_once(
    labeler: clipes.PseudoLabeler, folder: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    result = labeler.run(folder, tmp_path / "run", workers=1, follow=lambda *how: told.append(how))
    assert (result.maps.done, result.masks.done) == (3, 3)
    assert {failure.id for failure in result.failures} == {"3"}
    assert {stage for stage, _, _ in told} == {"look", "looks", "cam", "refine", "report"}
    assert [how for how in told if how[0] == "refine"][-1][1:] == (4, 4)  # the broken one, too
    assert "3.png" in result.failures[0].reason
    assert result.report == tmp_path / "run" / "report" / "index.html"
    assert result.report.is_file()
    assert (result.scored, result.segmenter, result.predicted) == (None, None, None)

    again = labeler.run(folder, tmp_path / "run", workers=1)
    assert (again.maps.done, again.maps.skipped) == (0, 3)
    assert (again.masks.done, again.masks.skipped) == (0, 3)
    (folder / "images" / "3.png").unlink()
    (folder / "labels.csv").write_text("image,labels\n0.png,dog\n1.png,dog;cat\n2.png,sofa\n")
    assert labeler.run(folder, tmp_path / "run", workers=1).maps.done == 3  # looks learnt anew

    command = ["cam", "--dataset", "folder", "--root", folder, "--weights", tiny_weights]
    command += ["--dino", labeler._asked.dino]
    for arguments in (
        [*command, "--workers", 1, "--out", "cli"],
        ["refine", "cli", "--workers", 1],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "clipes", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    mine, theirs = result.run, Run(tmp_path / "cli")
    assert mine.ids("pseudo") == theirs.ids("pseudo") == ["0", "1", "2"]
    for name in mine.ids("pseudo"):
        got, expected = mine.load_cams(name), theirs.load_cams(name)
        assert got.labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(got.maps, expected.maps, atol=2e-3)
        assert (mine.load_pseudo(name).mask == theirs.load_pseudo(name).mask).mean() > 0.99


def test_the_lambda_is_that_of_the_data_set(tiny_weights: Path) -> None:
    """``cam --dataset coco`` and Python agree."""
    for prompts, expected in (("coco", 0.7), ("voc", 0.4)):
        made = clipes.load(tiny_weights, prompts=prompts, device="cpu")
        assert made.preset.cam.box_threshold == expected
    own = get_preset("fast").with_box_threshold(0.5)
    made = clipes.load(tiny_weights, prompts="coco", preset=own, device="cpu")
    assert made.preset.cam.box_threshold == 0.5


def test_a_run_takes_the_lambda_of_its_data_set_where_the_words_are_ones_own(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``clipes run --dataset coco --prompts FILE`` does."""
    asked: list[Preset] = []

    def note(request: RunRequest, *_: object, **__: object) -> None:
        asked.append(request.cam.preset)
        raise UsageError("enough", "ask no more")

    monkeypatch.setattr("clipes.api.make_run_of", note)
    monkeypatch.setattr(
        "clipes.api.open_dataset", lambda *_, **__: Dataset("", tmp_path, tuple(CLASSES), (), ())
    )
    words = tmp_path / "mine.toml"
    words.write_text(Path("prompts/voc.toml").read_text("utf-8"), "utf-8")
    own = get_preset("fast").with_box_threshold(0.5)
    for preset, dataset, expected in (
        ("fast", "coco", 0.7),
        ("fast", "voc", 0.4),
        ("fast", "folder", 0.4),
        (own, "coco", 0.5),
    ):
        made = clipes.load(tiny_weights, prompts=words, preset=preset, device="cpu")
        with pytest.raises(UsageError, match="enough"):
            made.run(tmp_path, tmp_path / "run", dataset=dataset)
        assert asked.pop().cam.box_threshold == expected


@pytest.mark.parametrize(("preset", "count"), [("reference", 23), ("fast", 49)])
def test_the_published_method_keeps_to_its_background_words(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, count: int
) -> None:
    """From Python and in ``cam``."""
    asked: list[tuple[str, ...]] = []

    def note(*given: object, **named: object) -> Clip:
        asked.append(load_clip(*given, **named).text.background_words)
        raise UsageError("enough", "ask no more")

    monkeypatch.setattr("clipes.api.load_clip", note)
    monkeypatch.setattr("clipes.stages.with_clip.load_clip", note)
    with pytest.raises(UsageError, match="enough"):
        clipes.load(tiny_weights, prompts="coco", preset=preset, device="cpu")
    write_photos(tmp_path / "photos", 1)
    data = DataRequest("folder", tmp_path / "photos", prompts="coco")
    request = CamRequest(data, ClipRequest(str(tiny_weights)), get_preset(preset))
    with pytest.raises(UsageError, match="enough"):
        cam(request, Run(tmp_path / "run"), Resources(), Listener(print))
    assert [len(words) for words in asked] == [count, count]
    assert asked[0][:23] == load_vocabulary("coco").background


def test_further_background_words_are_not_for_tags(tiny_weights: Path, tmp_path: Path) -> None:
    """``tag`` and ``cam --labels auto`` agree: else the run would be refused."""
    write_photos(tmp_path / "photos", 2)
    run, asked = Run(tmp_path / "run"), ClipRequest(str(tiny_weights))
    data = DataRequest("folder", tmp_path / "photos", labels=Path("auto"), prompts="coco")
    words, given = load_vocabulary("coco"), Listener(print)
    wide = load_clip(asked, words, given, wide=True)
    assert wide.text.background_words == (*words.background, *words.more_background)
    narrow = that_tags(wide, words)
    assert narrow.text.background_words == words.background
    assert fingerprint(narrow.text) == fingerprint(load_clip(asked, words, given).text)
    tag_images(data, asked, run, given)
    cam(CamRequest(data, asked, get_preset("fast")), run, Resources(), given)
    assert run.cam_record().settings.text.sha256 == fingerprint(wide.text)


@pytest.mark.parametrize(
    ("size", "shrinks"),
    [
        ((640, 640), False),
        ((375, 500), False),
        ((1, 1), False),
        ((16, 25600), False),
        ((656, 640), True),
        ((17, 25600), True),
        ((9000, 12000), True),
    ],
)
def test_images_beyond_the_limit_are_known(
    labeler: clipes.PseudoLabeler, size: tuple[int, int], shrinks: bool
) -> None:
    assert labeler._maker.shrinks(size) == shrinks


def test_a_folder_teaches_classes_that_nobody_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "clip.safetensors"
    write_clip(weights, tmp_path / "text.npz")
    write_photos(tmp_path / "photos", 4)
    load = partial(clipes.load, weights, list(SMALL_CLASSES), preset="fast", device="cpu")
    with pytest.raises(UnknownClassError, match="channels, the weights"):
        load(fit=False)
    labeler = load()
    assert "run() fits vectors to its images and labels" in labeler.note
    assert labeler.note in caplog.text
    assert labeler.classes == SMALL_CLASSES
    photo = tmp_path / "photos" / "images" / "p000.jpg"
    with pytest.raises(UnknownClassError, match=r"call run\(\) on images with labels"):
        labeler.segment(photo, "cat")

    result = labeler.run(tmp_path / "photos", tmp_path / "run", workers=1)
    assert (result.maps.done, result.masks.done, result.failures) == (4, 4, ())
    again = labeler.run(tmp_path / "photos", tmp_path / "run", workers=1)
    assert (again.maps.done, again.maps.skipped) == (0, 4)
    later = load(text_features=result.run.words_path)
    np.testing.assert_array_equal(
        later.maps(photo, "cat").maps.astype(np.float16), result.run.load_cams("p000").maps
    )
