"""A small data set in COCO's layout, and its instances file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipes.datasets import COCO_CLASSES

CATEGORY_IDS = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
"""The ids that COCO 2014 uses, from its paper's list of 91 categories less the eleven dropped."""


def picture(number: int, split: str = "train", size: tuple[int, int] = (24, 32)) -> dict[str, Any]:
    name = f"COCO_{split}2014_{number:012d}.jpg"
    return {"id": number, "file_name": name, "height": size[0], "width": size[1]}


def annotation(image: int | str, category: int, outline: object = None, **more: Any) -> dict:
    square = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0, 9.0]] if outline is None else outline
    entry = {"segmentation": square, "area": 64.0, "iscrowd": 0, "bbox": [1, 1, 8, 8]}
    return {**entry, "image_id": image, "category_id": category, **more}


def categories(names: Sequence[str] = COCO_CLASSES) -> list[dict[str, Any]]:
    return [
        {"supercategory": "x", "id": key, "name": name}
        for key, name in zip(CATEGORY_IDS, names, strict=False)
    ]


def write_instances(
    path: Path, images: Sequence[dict], annotations: Sequence[dict], names: Sequence[str] = ()
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {
        "info": {"description": "made up", "year": 2014, "contributors": ["a", "b"]},
        "licenses": [{"id": 1, "name": "none"}],
        "images": images,
        "annotations": annotations,
        "categories": categories(names or COCO_CLASSES),
    }
    path.write_text(json.dumps(value))
    return path


def write_image(path: Path, size: tuple[int, int] = (24, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 128, np.uint8)).save(path)
    return path
