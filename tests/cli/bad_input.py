"""One bad input after another, each with the command that meets it.

``docs/bad-input.md`` has a row for every one of them; ``test_bad_input.py`` compares.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipes.config import get_preset
from clipes.disk.images import write_confidence, write_mask
from clipes.run.folder import Run
from clipes.seg.checkpoint import FORMAT, TrainingState, save_checkpoint
from clipes.seg.frozen import FrozenSpec, TokenInput
from clipes.seg.recipes import TestSettings
from clipes.types import CamMaps
from tests.cli.small_data import CLASSES, cam, train

Command = list[str]
Make = Callable[[Path], Command]


@dataclass(frozen=True)
class Case:
    """A bad input: what makes it in an empty folder, and returns the command."""

    what: str
    make: Make


CASES: list[Case] = []


def case(what: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        CASES.append(Case(what, make))
        return make

    return keep


def picture(size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).convert(mode)


def folder(root: Path, labels: str = "a.jpg,cat\n", header: str = "image,labels\n") -> Path:
    """A data set of one good image ``a.jpg``; return the folder of images."""
    images = root / "photos" / "images"
    images.mkdir(parents=True)
    picture().save(images / "a.jpg")
    (root / "photos" / "classes.txt").write_text("\n".join(CLASSES))
    (root / "photos" / "labels.csv").write_text(header + labels)
    return images


def with_bad(root: Path, name: str = "bad.jpg") -> Path:
    """The same and a row for a bad image; return where that is to be."""
    return folder(root, f"a.jpg,cat\n{name},dog\n") / name


def replace(command: Command, option: str, value: str) -> Command:
    index = command.index(option)
    return [*command[: index + 1], value, *command[index + 2 :]]


# --- images


@case("a JPEG that breaks off")
def _(root: Path) -> Command:
    path = with_bad(root)
    picture().save(path)
    path.write_bytes(path.read_bytes()[:400])
    return cam("run")


@case("an empty file")
def _(root: Path) -> Command:
    with_bad(root).touch()
    return cam("run")


@case("text that is called `.jpg`")
def _(root: Path) -> Command:
    with_bad(root).write_text("<html>no such page</html>")
    return cam("run")


@case("a folder that is called `.jpg`")
def _(root: Path) -> Command:
    with_bad(root).mkdir()
    return cam("run")


@case("a link that leads to itself")
def _(root: Path) -> Command:
    path = with_bad(root)
    path.symlink_to(path.name)
    return cam("run")


@case("an image that is listed but not there")
def _(root: Path) -> Command:
    with_bad(root)
    return cam("run")


def saved(mode: str, suffix: str, kind: str | None = None, **options: Any) -> Make:
    def make(root: Path) -> Command:
        name = f"bad{suffix}"
        picture(mode=mode).save(with_bad(root, name), format=kind, **options)
        return cam("run")

    return make


@case("one that is there in other capitals")
def _(root: Path) -> Command:
    picture().save(with_bad(root, "BAD.jpg").with_name("bad.jpg"))
    return cam("run")


@case("a JPEG without a suffix")
def _(root: Path) -> Command:
    picture().save(folder(root) / "b", "JPEG")
    return cam("run")


case("a PNG that is called `.jpg`")(saved("RGB", ".jpg", "PNG"))
case("a PNG with transparent parts: they are laid on white")(saved("RGBA", ".png"))
case("a grey JPEG")(saved("L", ".jpg"))
case("a CMYK JPEG")(saved("CMYK", ".jpg"))
case("a palette PNG with a transparent colour")(saved("P", ".png", transparency=0))
case("a TIFF of 32-bit floats")(saved("F", ".tif"))


@case("a 16-bit grey PNG")
def _(root: Path) -> Command:
    grey = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(grey).save(with_bad(root, "bad.png"))
    return cam("run")


@case("a JPEG that EXIF turns by 90 degrees: it is worked on upright")
def _(root: Path) -> Command:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(with_bad(root), exif=exif)
    return cam("run")


@case("a GIF: its first frame counts")
def _(root: Path) -> Command:
    frames = [picture(), picture(mode="L").convert("RGB")]
    frames[0].save(with_bad(root, "bad.gif"), save_all=True, append_images=frames[1:])
    return cam("run")


case("a JPEG that is called `.jfif`")(saved("RGB", ".jfif", "JPEG"))


@case("a photo of a kind that is not read")
def _(root: Path) -> Command:
    with_bad(root, "bad.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    return cam("run")


@case("one that is not listed")
def _(root: Path) -> Command:
    (folder(root) / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    return cam("run")


@case("an image of 1 x 1")
def _(root: Path) -> Command:
    picture((1, 1)).save(with_bad(root, "bad.png"))
    return cam("run")


@case("an image of 4000 x 40")
def _(root: Path) -> Command:
    picture((40, 4000)).save(with_bad(root, "bad.png"))
    return cam("run")


@case("a photo of 6 megapixels in `refine`, likewise one of 108")
def _(root: Path) -> Command:
    images = folder(root)
    picture((3000, 2000)).save(images / "a.jpg")
    run = Run(root / "run")
    maps = np.linspace(0, 1, 6, dtype=np.float32).reshape(1, 2, 3)
    run.save_cams("a", CamMaps(np.array([0]), maps, (2000, 3000)))
    begin(run)
    return ["refine", "run", "--preset", "fast"]


def png(width: int, height: int) -> bytes:
    """A grey PNG that promises a size, and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@case("a decompression bomb: a small PNG of 11000 x 11000 pixels")
def _(root: Path) -> Command:
    with_bad(root, "bad.png").write_bytes(png(11_000, 11_000))
    return cam("run")


@case("a larger one")
def _(root: Path) -> Command:
    with_bad(root, "bad.png").write_bytes(png(200_000, 200_000))
    return cam("run")


@case("a file name that is not UTF-8, unlisted")
def _(root: Path) -> Command:
    images = folder(root)
    picture().save(images / "b.jpg")
    (images / "b.jpg").rename(Path(os.fsdecode(os.fsencode(images) + b"/b\xff.jpg")))
    return cam("run")


@case("a file name that cannot be printed, listed too")
def _(root: Path) -> Command:
    images = folder(root, "a.jpg,cat\nb\x07b.jpg,cat\n")
    picture().save(images / "b\x07b.jpg")
    return cam("run")


@case("an image too large, in `check`")
def _(root: Path) -> Command:
    with_bad(root, "bad.png").write_bytes(png(200_000, 200_000))
    return ["check", "--dataset", "folder", "--root", "photos"]


# --- labels


def labels(rows: str, header: str = "image,labels\n") -> Make:
    def make(root: Path) -> Command:
        images = folder(root, rows, header)
        picture().save(images / "b.jpg")
        return cam("run")

    return make


case("an image without labels")(labels("a.jpg,cat\nb.jpg,\n"))
case("a class that is not known")(labels("a.jpg,cat\nb.jpg,dgo\n"))
case("a class number out of range")(labels("a.jpg,0\nb.jpg,3\n"))
case("a class in other capitals")(labels("a.jpg,cat\nb.jpg,DOG\n"))
case("a row for every label, one of them twice")(
    labels("a.jpg,cat\na.jpg,dog\na.jpg,cat\nb.jpg,dog\n")
)
case("a row by the path of an image, another by its id")(
    lambda root: in_folders("a.jpg,cat\nx/1.jpg,cat\nx_1,dog\n", "images/x/1.jpg")(root)
)
case("two images that have one name")(labels("a.jpg,cat\nb.jpg,cat\nb.png,dog\n"))


def unnamed(rows: str) -> Make:
    """The same where nothing says what the classes are."""

    def make(root: Path) -> Command:
        command = labels(rows)(root)
        (root / "photos" / "classes.txt").unlink()
        return command

    return make


case("a comma that may separate or not")(unnamed('a.jpg,cat\nb.jpg,"pipe, rusty"\n'))
case("a slash that may separate or not")(
    unnamed("a.jpg,cat\nb.jpg,cat/dog\na.jpg,dog\n"),
)


@case("a comma in a label of a JSON list")
def _(root: Path) -> Command:
    command = unnamed("a.jpg,cat\n")(root)
    (root / "labels.json").write_text('{"a.jpg": ["cat,dog"], "b.jpg": ["dog", "cat"]}')
    return [*command, "--labels", "labels.json"]


case("commas between labels, no other mark")(unnamed('a.jpg,cat\nb.jpg,"cat,dog"\n'))
case("a space in a name, no mark")(unnamed("a.jpg,cat\nb.jpg,traffic light\n"))


@case("a space that may separate or not")
def _(root: Path) -> Command:
    folder(root)
    (root / "photos" / "classes.txt").unlink()
    (root / "labels.txt").write_text("a.jpg traffic light\n")
    return [*cam("run"), "--labels", "labels.txt"]


case("a class that is spelt in two ways")(unnamed("a.jpg,Cat\nb.jpg,cat\na.jpg,cat\n"))
case("a class that is a plural")(unnamed("a.jpg,cats\nb.jpg,dog\n"))
case("a path that leads out of the folder")(labels("a.jpg,cat\n../../etc/passwd,cat\n"))
case("an absolute path: only its last part counts")(labels("a.jpg,cat\n/etc/passwd,cat\n"))
case("an id that is a hidden file's")(labels("a.jpg,cat\n.ssh,cat\n"))
case("a row of the wrong length")(labels("a.jpg,cat\nb.jpg,cat,dog\n"))
case("a CSV without header")(labels("a.jpg,cat\n", header=""))
case("a CSV whose columns are called otherwise")(
    labels("a.jpg,cat\nb.jpg,dog\n", header="filename,class\n")
)
case("a CSV whose columns could be anything")(labels("a.jpg,cat\n", header="photo,animal\n"))


def in_lines(text: str) -> Make:
    """Labels in a ``.txt`` of which nothing else says what the classes are."""

    def make(root: Path) -> Command:
        command = unnamed("a.jpg,cat\n")(root)
        (root / "labels.txt").write_text(text)
        return [*command, "--labels", "labels.txt"]

    return make


case("labels in lines, a comma after the image's name")(in_lines("a.jpg,cat,dog\nb.jpg,dog\n"))
case("labels in lines, a comma after an image's id")(in_lines("a,cat\nb,dog\n"))
case("labels that are empty")(labels("", header="image,labels\n"))


def in_folders(rows: str, *names: str, command: Sequence[str] = ()) -> Make:
    """Images, or masks, under names below the data set; without rows, no label file."""

    def make(root: Path) -> Command:
        folder(root, rows)
        if not rows:
            for name in ("labels.csv", "classes.txt", "images/a.jpg"):
                (root / "photos" / name).unlink()
        for name in names:
            path = root / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture().save(path)
        return list(command) or cam("run")

    return make


CHECK = ("check", "--dataset", "folder", "--root", "photos")
EQUAL = ("images/x/1.jpg", "images/y/1.jpg")
case("equal names in folders, named by their paths")(
    in_folders("a.jpg,cat\nx/1.jpg,cat\ny/1.jpg,dog\n", *EQUAL)
)
case("a file name that fits several images")(in_folders("a.jpg,cat\n1.jpg,cat\n", *EQUAL))
case("a picture in a folder that is not there, its namesake elsewhere")(
    in_folders("a.jpg,cat\nx/2.jpg,cat\nx/1.jpg,dog\ny/2.jpg,dog\n", EQUAL[0], "images/y/2.jpg")
)
case("pictures in sub-folders that no row names")(in_folders("a.jpg,cat\n", *EQUAL))
case("two files that would have one id")(
    in_folders("a.jpg,cat\nx_1,dog\n", "images/x/1.jpg", "images/x_1.jpg")
)
case("masks that are called otherwise")(
    in_folders("a.jpg,cat\n", "masks/a_mask.png", "masks/a.jpg", command=CHECK)
)
case("sub-folders in the folder of a class")(
    in_folders("", "images/cat/1.jpg", "images/dog/x/1.jpg")
)
case("a picture beside the folders of classes")(
    in_folders("", "images/1.jpg", "images/cat/1.jpg", "images/dog/1.jpg")
)
case("folders of classes in folders of another kind")(
    in_folders("", "images/train/cat/1.jpg", "images/val/dog/1.jpg")
)
case("no image of a kind that is read")(
    lambda root: (in_folders("")(root), (root / "photos/images/1.heic").touch())[0]
)


@case("labels that are not UTF-8")
def _(root: Path) -> Command:
    folder(root)
    (root / "photos" / "labels.csv").write_bytes(b"image,labels\na.jpg,caf\xe9\n")
    return cam("run")


@case("classes that are 255")
def _(root: Path) -> Command:
    folder(root)
    (root / "photos" / "classes.txt").write_text("\n".join(f"c{k}" for k in range(255)))
    return cam("run")


@case("an image with 200 labels")
def _(root: Path) -> Command:
    names = [f"c{k}" for k in range(200)]
    folder(root, f"a.jpg,{';'.join(names)}\n")
    (root / "photos" / "classes.txt").write_text("\n".join(names))
    features = np.random.default_rng(0).standard_normal((202, 16)).astype(np.float32)
    write_features(root, features, names=np.array([*names, "grass", "sky"]))
    return cam("run")


@case("labels in JSON that breaks off")
def _(root: Path) -> Command:
    folder(root)
    (root / "labels.json").write_text('{"a.jpg": ["cat"')
    return [*cam("run"), "--labels", "labels.json"]


@case("labels in JSON nested a million deep")
def _(root: Path) -> Command:
    folder(root)
    (root / "labels.json").write_text("[" * 1_000_000)
    return [*cam("run"), "--labels", "labels.json"]


class Evil:
    """What a pickle can do: here, run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@case("labels in a pickled `.npy`")
def _(root: Path) -> Command:
    folder(root)
    (root / "train.txt").write_text("a\n")
    np.save(root / "labels.npy", np.array({"a": Evil()}, dtype=object), allow_pickle=True)
    return [*cam("run"), "--labels", "labels.npy", "--split", "train.txt"]


@case("labels in a pickled `.npz`")
def _(root: Path) -> Command:
    folder(root)
    np.savez(root / "labels.npz", ids=np.array([Evil()], dtype=object), labels=np.eye(1))
    return [*cam("run"), "--labels", "labels.npz"]


@case("a list of images that leads out of the data set")
def _(root: Path) -> Command:
    folder(root)
    (root / "train.txt").write_text("a\n../../../etc/passwd\n")
    return [*cam("run"), "--split", "train.txt"]


@case("a list of images that is no text")
def _(root: Path) -> Command:
    folder(root)
    (root / "train.txt").write_bytes(bytes(range(256)))
    return [*cam("run"), "--split", "train.txt"]


@case("a list of images that is absent")
def _(root: Path) -> Command:
    folder(root)
    return [*cam("run"), "--split", "train"]


@case("a list of images that names one that is absent")
def _(root: Path) -> Command:
    folder(root)
    (root / "train.txt").write_text("a.jpg\nnope.jpg\n")
    return [*cam("run"), "--split", "train.txt"]


@case("a run folder for a data set")
def _(root: Path) -> Command:
    maps(lambda run: write_mask(run.pseudo_path("a"), np.zeros((48, 64), np.uint8)))(root)
    return cam("out", "run")


@case("a data set that is absent")
def _(root: Path) -> Command:
    return cam("run")


# --- annotations

ANNOTATION = "<annotation><object><name>cat</name></object></annotation>"


def voc(text: str | None) -> Make:
    def make(root: Path) -> Command:
        root = root / "voc"
        for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
            (root / name).mkdir(parents=True)
        for name in ("a", "b"):
            picture().save(root / "JPEGImages" / f"{name}.jpg")
        (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
        (root / "Annotations/a.xml").write_text(ANNOTATION)
        if text is not None:
            (root / "Annotations/b.xml").write_text(text)
        return ["check", "--dataset", "voc", "--root", "voc"]

    return make


LAUGHS = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, 10))
case("VOC: an annotation with an external entity")(
    voc('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>')
)
case("VOC: an annotation with a billion laughs")(
    voc(f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>')
)
case("VOC: an annotation that breaks off")(voc(ANNOTATION[:40]))
case("VOC: an annotation that is absent")(voc(None))
case("VOC: an annotation with no object")(voc("<annotation/>"))
case("VOC: an object of another class")(voc(ANNOTATION.replace("cat", "unicorn")))


def coco(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        content: dict[str, Any] = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}],
            "annotations": [{"image_id": 1, "category_id": 1}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        text = change(content)
        (root / "i.json").write_text(text if isinstance(text, str) else json.dumps(content))
        return [*cam("run"), "--labels", "i.json"]

    return make


case("COCO: an image that is not there")(
    coco(
        lambda it: (
            it["images"].append({"id": 2, "file_name": "gone.jpg"}),
            it["annotations"].append({"image_id": 2, "category_id": 1}),
        )
    )
)
case("COCO: annotations of an image that is not listed")(
    coco(lambda it: it["annotations"].append({"image_id": 7, "category_id": 1}))
)
case("COCO: a category that is not listed")(
    coco(lambda it: it["annotations"].append({"image_id": 1, "category_id": 9}))
)
case("COCO: no list of categories")(coco(lambda it: it.pop("categories")))
case("COCO: a file that breaks off")(coco(lambda it: json.dumps(it)[:-30]))
case("COCO: a file name that leads out of the folder")(
    coco(lambda it: it["images"].append({"id": 2, "file_name": "../../etc/passwd"}))
)


def outline(segmentation: object) -> Make:
    def make(root: Path) -> Command:
        (root / "coco" / "train2014").mkdir(parents=True)
        picture().save(root / "coco" / "train2014" / "a.jpg")
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}],
            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": segmentation}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / "coco" / "annotations").mkdir()
        path = root / "coco" / "annotations" / "instances_train2014.json"
        path.write_text(json.dumps(content))
        return ["masks", "--root", "coco"]

    return make


case("COCO: run lengths that do not add up, in `masks`")(outline({"counts": "a3"}))
case("COCO: a negative run length")(outline({"counts": [3073, -1]}))
case("COCO: a polygon of two corners")(outline([[1, 1, 9, 9]]))
case("COCO: a polygon that leads far away")(outline([[1, 1, 9, 1, 1e9, 9]]))
case("COCO: a polygon that goes to and fro")(outline([[-9e5, 0, 9e5, 9] * 1000]))


# --- weights, vectors, words


def weights(name: str, write: Callable[[Path, dict[str, torch.Tensor]], None]) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        write(root / name, load_file(root / "clip.safetensors"))
        return replace(cam("run"), "--weights", name)

    return make


case("weights: a pickle that runs code")(
    weights("w.pt", lambda path, _: path.write_bytes(pickle.dumps(Evil())))
)
case("weights: `torch.save` of a program")(
    weights("w.pt", lambda path, _: torch.save(Evil(), path))
)
case("weights: safetensors that break off")(
    weights(
        "w.safetensors",
        lambda path, state: (
            save_file(state, path),
            path.write_bytes(path.read_bytes()[:1000]),
        ),
    )
)
case("weights: a tensor of another shape")(
    weights(
        "w.safetensors",
        lambda path, state: save_file({**state, "visual.ln_post.bias": torch.zeros(3)}, path),
    )
)
case("weights: numbers that are not finite")(
    weights(
        "w.safetensors",
        lambda path, state: save_file(
            {**state, "visual.ln_post.bias": torch.full((64,), torch.nan)}, path
        ),
    )
)
case("weights: not those of a CLIP")(
    weights("w.safetensors", lambda path, _: save_file({"fc.weight": torch.zeros(2)}, path))
)
case("weights: a web page")(
    weights("w.pt", lambda path, _: path.write_text("<!DOCTYPE html><html></html>"))
)
case("weights: a file that is absent")(weights("w.pt", lambda *_: None))


def write_features(root: Path, features: np.ndarray, **more: np.ndarray) -> None:
    names = np.array([*CLASSES, "grass", "sky"])
    arrays = {"names": names, "features": features, "model": np.array("x"), **more}
    background = np.isin(arrays["names"], ("grass", "sky"))
    np.savez(root / "text.npz", **{"background": background, **arrays})


def features(make_features: Callable[[Path], object]) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        make_features(root)
        return cam("run")

    return make


ONES = np.ones((5, 16), np.float32)
case("vectors: a number that is not finite")(
    features(lambda root: write_features(root, ONES * np.float32(np.nan)))
)
case("vectors: of another width than the tower's")(
    features(lambda root: write_features(root, np.ones((5, 8), np.float32)))
)
case("vectors: a class is missing")(
    features(
        lambda root: write_features(
            root, ONES, names=np.array(["cat", "cow", "pig", "grass", "sky"])
        )
    )
)
case("vectors: pickled")(
    features(lambda root: write_features(root, ONES, names=np.array([Evil()] * 5, dtype=object)))
)
case("vectors: no archive")(features(lambda root: (root / "text.npz").write_bytes(b"PK\3\4junk")))


def prompts(text: str) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        (root / "my.toml").write_text(text)
        return [*cam("run"), "--prompts", "my.toml"]

    return make


case("words: TOML with a mistake")(prompts('classes = ["cat"\n'))
case("words: classes that are numbers")(prompts("classes = [1, 2]\n"))
case("words: a template without {}")(prompts('classes = ["cat"]\ntemplate = "a photo"\n'))
case("words: descriptions of no class")(
    prompts('classes = ["cat"]\n[descriptions]\ncats = ["soft fur"]\n')
)
case("words: more descriptions than are read")(
    prompts(f'classes = ["cat"]\n[descriptions]\ncat = {[f"fur {k}" for k in range(50)]}\n')
)


@case("words: descriptions, and nothing to encode them")
def _(root: Path) -> Command:
    command = prompts('classes = ["cat", "dog", "sofa"]\n[descriptions]\ncat = ["soft fur"]\n')(
        root
    )
    return [*command, "--descriptions", "average"]


# --- run folders


def begin(run: Run, classes: Sequence[str] = CLASSES) -> None:
    settings: dict[str, Any] = {"dataset": "folder", "split": None, "labels": None}
    settings["classes"] = list(classes)
    settings["preset"] = get_preset("reference").to_dict()
    run.begin("cam", settings, "clipes cam", {"root": "photos"})


def maps(change: Callable[[Run], object]) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        run = Run(root / "run")
        begin(run)
        run.save_cams("a", CamMaps(np.array([0]), np.ones((1, 3, 4), np.float32), (48, 64)))
        change(run)
        return ["refine", "run", "--workers", "1"]

    return make


def other_maps(run: Run, **change: np.ndarray) -> None:
    arrays = {
        "labels": np.array([0]),
        "maps": np.ones((1, 3, 4), np.float16),
        "size": np.array([48, 64]),
    }
    np.savez(run.cams_path("a"), **{**arrays, **change})


case("maps that break off")(
    maps(lambda run: run.cams_path("a").write_bytes(run.cams_path("a").read_bytes()[:99]))
)
case("maps that are absent")(maps(lambda run: run.cams_path("a").unlink()))
case("maps that are pickled")(
    maps(lambda run: other_maps(run, maps=np.array([Evil()], dtype=object)))
)
case("maps of shapes that do not fit")(maps(lambda run: other_maps(run, labels=np.array([0, 1]))))
case("maps with values that are not finite")(
    maps(lambda run: other_maps(run, maps=np.full((1, 3, 4), np.nan, np.float16)))
)
case("maps of a class out of range")(maps(lambda run: other_maps(run, labels=np.array([254]))))
case("maps of an image of another size")(maps(lambda run: other_maps(run, size=np.array([64, 48]))))
case("maps of an image larger than any")(
    maps(lambda run: other_maps(run, size=np.array([10**6, 10**6])))
)
case("a damaged `run.json`")(maps(lambda run: run.manifest_path.write_text('{"schema": 1')))
case("a `run.json` of another schema")(
    maps(lambda run: run.manifest_path.write_text('{"schema": 9}'))
)
case("a `run.json` that says too little")(
    maps(
        lambda run: run.manifest_path.write_text(
            '{"schema": 1, "stages": {"cam": {"settings": {}}}}'
        )
    )
)
case("a folder that is no run folder")(maps(lambda run: run.manifest_path.unlink()))


@case("a run folder of other settings")
def _(root: Path) -> Command:
    folder(root)
    begin(Run(root / "run"), classes=["cow"])
    return cam("run")


def masks(change: Callable[[Path], object]) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        run = Run(root / "run")
        begin(run)
        write_mask(run.pseudo_path("a"), np.zeros((48, 64), np.uint8))
        change(run.pseudo_path("a"))
        return train("run", "run")

    return make


@case("a list for `train-seg --val` that is absent")
def _(root: Path) -> Command:
    return [*masks(lambda _: None)(root), "--val", "train"]


case("masks in colours, in `train-seg`")(masks(lambda path: picture().save(path)))
case("a mask that breaks off")(masks(lambda path: path.write_bytes(path.read_bytes()[:60])))
case("a mask of another size")(masks(lambda path: write_mask(path, np.zeros((4, 4), np.uint8))))
case("a mask of a class out of range")(
    masks(lambda path: write_mask(path, np.full((48, 64), 9, np.uint8)))
)
case("masks that are all 255")(
    masks(lambda path: write_mask(path, np.full((48, 64), 255, np.uint8)))
)


@case("a threshold that no pixel reaches")
def _(root: Path) -> Command:
    masks(lambda _: None)(root)
    write_confidence(Run(root / "run").confidence_path("a"), np.full((48, 64), 0.9, np.float32))
    return [*train("run", "run"), "--cgl", "--threshold", "1"]


@case("masks of background only")
def _(root: Path) -> Command:
    return masks(lambda _: None)(root)


def truth(mask: np.ndarray) -> Make:
    def make(root: Path) -> Command:
        right = np.zeros((48, 64), np.uint8)
        right[8:24] = 1
        write_mask(root / "masks" / "a.png", right)
        write_mask(root / "truth" / "a.png", mask.astype(np.uint8))
        return ["eval", "masks", "--gt", "truth"]

    return make


case("ground truth of 0 and 255, in `eval`")(truth(np.tile([0, 255], (48, 32))))


@case("the same in `check`")
def _(root: Path) -> Command:
    folder(root)
    write_mask(root / "photos/masks/a.png", np.tile([0, 255], (48, 32)).astype(np.uint8))
    return list(CHECK)


case("ground truth of another size")(truth(np.zeros((4, 4))))
case("ground truth of a class out of range")(truth(np.full((48, 64), 99)))


@case("a folder of ground truth that is absent")
def _(root: Path) -> Command:
    return [*truth(np.zeros((48, 64)))(root)[:-1], "truht"]


@case("ground truth that is no PNG")
def _(root: Path) -> Command:
    command = truth(np.zeros((48, 64)))(root)
    (root / "truth" / "a.png").rename(root / "truth" / "a.jpg")
    return command


@case("masks to learn from that are called otherwise")
def _(root: Path) -> Command:
    command = masks(lambda _: None)(root)
    write_mask(root / "mine" / "a_mask.png", np.zeros((48, 64), np.uint8))
    return [*command, "--masks", "mine"]


def checkpoint(content: Callable[[], bytes]) -> Make:
    def make(root: Path) -> Command:
        folder(root)
        (root / "final.pt").write_bytes(content())
        return ["predict", "final.pt", "photos/images", "--out", "masks"]

    return make


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


case("a checkpoint that runs code")(checkpoint(lambda: torch_saved(Evil())))
case("a checkpoint of another program")(checkpoint(lambda: torch_saved({"w": torch.zeros(2)})))
case("a checkpoint that breaks off")(checkpoint(lambda: torch_saved({"w": torch.zeros(99)})[:300]))
case("a checkpoint of a kind that a newer clipes has")(
    checkpoint(lambda: torch_saved({"format": FORMAT, "kind": "mamba"}))
)
case("a checkpoint whose model is not described")(
    checkpoint(lambda: torch_saved({"format": FORMAT, "model": {"arch": "deeplabv2"}}))
)


@case("a checkpoint of other classes, in `relabel`")
def _(root: Path) -> Command:
    maps(lambda _: None)(root)
    model = FrozenSpec((TokenInput("clip.4", 8),), ("cat", "cow"), 8, 1, 1).build()
    save_checkpoint(root / "final.pt", model, TrainingState(), TestSettings())
    return ["relabel", "run", "--from", "final.pt"]


case("`train-seg --relabelled` before any `relabel`")(
    lambda root: [*masks(lambda _: None)(root), "--relabelled"]
)


def exported(record: str) -> Make:
    def make(root: Path) -> Command:
        maps(lambda run: write_mask(run.pseudo_path("a"), np.zeros((48, 64), np.uint8)))(root)
        (root / "out").mkdir()
        (root / "out" / "export.json").write_text(record)
        return ["export", "run", "--format", "voc", "--out", "out"]

    return make


case("an `export.json` of something else")(exported('{"settings": []}'))
case("an `export.json` nested a million deep")(exported("[" * 1_000_000))


def corrected(name: str, form: str, text: str) -> Make:
    def make(root: Path) -> Command:
        maps(lambda _: None)(root)
        (root / "mended").mkdir()
        (root / "mended" / name).write_text(text)
        return ["import", "run", "mended", "--format", form]

    return make


def shape(label: str, corner: int) -> str:
    points = [[0, 0], [corner, 0], [0, 5]]
    shapes = [{"label": label, "points": points, "shape_type": "polygon"}]
    return json.dumps({"shapes": shapes, "imageHeight": 48, "imageWidth": 64})


case("a corrected mask of a class that the run has not")(
    corrected("a.json", "labelme", shape("wolf", 5))
)
case("one with a corner outside the picture")(corrected("a.json", "labelme", shape("cat", 99)))
case("one of no image of the run")(corrected("b.json", "labelme", shape("cat", 5)))
case("an `annotations.xml` with an entity")(
    corrected(
        "annotations.xml", "cvat", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>'
    )
)


@case("a corrected mask of another size")
def _(root: Path) -> Command:
    maps(lambda _: None)(root)
    write_mask(root / "mended" / "a.png", np.zeros((4, 4), np.uint8))
    return ["import", "run", "mended", "--format", "voc"]


@case("a ranking of templates with a text for a number")
def _(root: Path) -> Command:
    folder(root)
    command = [*cam("run"), "--template", "best"]
    ranking = {"kind": "templates", "ranking": [["a {}.", "high"]]}
    (root / "run").mkdir()
    (root / "run" / "prompts.json").write_text(json.dumps(ranking))
    return command
