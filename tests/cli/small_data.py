"""A data set and a CLIP so small that a command is over in no time; nothing from outside."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from clipes.disk.images import write_mask
from clipes.run.folder import Run

CLASSES = ("cat", "dog", "sofa")


def write_clip(path: Path, text_features: Path, *, layers: int = 4) -> None:
    """Write an image tower of real architecture, and vectors of the classes and two other words."""
    torch.manual_seed(0)
    tower = {"width": 64, "layers": layers}
    model = CLIP(
        embed_dim=16,
        vision_cfg={**tower, "image_size": 64, "patch_size": 16, "head_width": 64},
        text_cfg={**tower, "context_length": 7, "vocab_size": 11, "heads": 2},
    )
    state = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
    save_file({**state, "logit_scale": torch.tensor(4.5)}, path)
    words = [*CLASSES, "grass", "sky"]
    vectors = np.random.default_rng(0).standard_normal((len(words), 16)).astype(np.float32)
    np.savez(
        text_features,
        names=np.array(words),
        features=vectors,
        background=np.array([word not in CLASSES for word in words]),
        model=np.array("ViT-B-16"),
    )


def write_photos(root: Path, count: int, size: tuple[int, int] = (48, 64)) -> list[str]:
    """Write pictures ``p000.jpg`` on with labels and masks; return their ids."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    lines = ["image,labels"]
    ids = [f"p{index:03}" for index in range(count)]
    height, width = size
    for index, id_ in enumerate(ids):
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(root / "images" / f"{id_}.jpg")
        truth = np.zeros(size, np.uint8)
        truth[height // 4 : height // 2, width // 4 : width // 2] = 1 + index % len(CLASSES)
        write_mask(root / "masks" / f"{id_}.png", truth)
        more = ";dog" if index % 3 == 2 else ""
        lines.append(f"{id_}.jpg,{CLASSES[index % len(CLASSES)]}{more}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return ids


def write_refined(folder: Path, photos: Path, count: int) -> Run:
    """Write a run folder with masks to learn from, of ``count`` photos that are written, too."""
    write_photos(photos, count)
    run = Run(folder)
    settings = {"dataset": "folder", "split": None, "labels": None, "classes": list(CLASSES)}
    run.begin("cam", settings, "clipes cam", {"root": str(photos)})
    shutil.copytree(photos / "masks", run.root / "pseudo")
    return run


def cam(out: object, root: object = "photos") -> list[str]:
    """Return the command that makes the maps of ``root`` with the small CLIP."""
    command = ["cam", "--dataset", "folder", "--root", str(root), "--out", str(out)]
    return [*command, "--weights", "clip.safetensors", "--text-features", "text.npz"]


def train(run: object, out: object) -> list[str]:
    """Return the command that trains for a few seconds."""
    command = ["train-seg", "--no-cgl", "--run", str(run), "--out", str(out)]
    command += ["--backbone", "mobilenet_v3_large", "--backbone-weights", "none", "--crop", "32"]
    command += ["--batch", "2", "--no-multi-scale", "--no-flip", "--test-scales", "1"]
    return [*command, "--iterations", "8", "--save-every", "1"]
