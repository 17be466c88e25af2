"""Laid out as MMSegmentation reads it, with the part of a configuration that says so.

::

    img_dir/<split>/<id>.jpg    links to the images, or copies
    ann_dir/<split>/<id>.png    palette masks, or grey ones; 0 background, 255 not labelled
    <split>.txt                 the ids; one list for each suffix if images have several
    dataset.py                  classes, palette, data set and loader: a _base_ for a configuration
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipes.datasets.base import IMAGE_SUFFIXES
from clipes.disk.files import write_text
from clipes.disk.images import voc_palette
from clipes.formats.base import Plan, image_suffix, list_text
from clipes.formats.voc import FolderWriter

_HEAD = """# Written by 'clipes export --format mmseg'. In your configuration:
#     _base_ = [..., {path!r}]
#     model = dict(decode_head=dict(num_classes={count}))
data_root = {root!r}
metainfo = dict(
    classes={classes!r},
    palette={palette!r},
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
"""
_PART = """dict(
    type='BaseSegDataset',
    data_root=data_root,
    ann_file={ann_file!r},
    data_prefix=dict(img_path={images!r}, seg_map_path={masks!r}),
    img_suffix={suffix!r},
    seg_map_suffix='.png',
    metainfo=metainfo,
    reduce_zero_label=False,
    ignore_index=255,
    pipeline=train_pipeline,
)"""
_TAIL = """train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=train_dataset,
)
"""


@contextmanager
def write_mmseg(plan: Plan) -> Iterator[FolderWriter]:
    """Open the writer of the format."""
    images, masks = Path("img_dir", plan.split), Path("ann_dir", plan.split)
    writer = FolderWriter(plan, images, masks, grey=plan.options.grey)
    yield writer
    by_suffix: dict[str, list[str]] = {}
    for sample in writer.written():
        by_suffix.setdefault(image_suffix(sample), []).append(sample.id)
    lists = {suffix: _list_name(plan.split, suffix, by_suffix) for suffix in by_suffix}
    # A list of before would name images that are gone, or that another list has now.
    for suffix in IMAGE_SUFFIXES:
        for old in {f"{plan.split}.txt", f"{plan.split}-{suffix[1:]}.txt"} - {*lists.values()}:
            (plan.folder / old).unlink(missing_ok=True)
    for suffix, ids in by_suffix.items():
        write_text(plan.folder / lists[suffix], list_text(ids))
    write_text(plan.folder / "dataset.py", _config(plan, images, masks, lists))


def _list_name(split: str, suffix: str, all_suffixes: Sequence[str] | Mapping[str, object]) -> str:
    return f"{split}.txt" if len(all_suffixes) == 1 else f"{split}-{suffix[1:]}.txt"


def _config(plan: Plan, images: Path, masks: Path, lists: Mapping[str, str]) -> str:
    count = 1 + len(plan.classes)
    root = plan.folder.absolute().as_posix()
    head = _HEAD.format(
        path=f"{root}/dataset.py",
        count=count,
        root=root,
        classes=("background", *plan.classes),
        palette=voc_palette()[:count].tolist(),
    )
    parts = [
        _PART.format(ann_file=name, images=images.as_posix(), masks=masks.as_posix(), suffix=suffix)
        for suffix, name in lists.items()
    ]
    joined = ",\n".join(parts)
    whole = parts[0] if len(parts) == 1 else f"dict(type='ConcatDataset', datasets=[{joined}])"
    return f"{head}train_dataset = {whole}\n{_TAIL}"
