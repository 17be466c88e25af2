"""What the tests of the weights share: a small CLIP, an HTTP server, a wheel."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from open_clip.model import CLIP
from torch import nn

from clipes.weights.registry import Wheel


def small_clip(seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of open_clip's own CLIP, with two small blocks per tower."""
    torch.manual_seed(seed)
    tower = {"width": 16, "layers": 2}
    model = CLIP(
        embed_dim=8,
        vision_cfg={**tower, "image_size": 32, "patch_size": 8, "head_width": 8},
        text_cfg={**tower, "context_length": 7, "vocab_size": 11, "heads": 2},
    )
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    return state | {"logit_scale": torch.tensor(4.5)}


def published(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the types OpenAI publishes: fp16 but for the norms."""
    return {k: v if ".ln_" in k or k.startswith("ln_") else v.half() for k, v in state.items()}


class _Node(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_torchscript(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a TorchScript archive with the module tree that the keys describe."""
    root = _Node()
    for key, value in state.items():
        *parents, leaf = key.split(".")
        node: nn.Module = root
        for name in parents:
            if name not in dict(node.named_children()):
                node.add_module(name, _Node())
            node = node.get_submodule(name)
        node.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what OpenAI published with
        torch.jit.save(torch.jit.script(root), path)


@dataclass
class Server:
    """A web server on this machine: what it answers, and how often it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    content_type: str = "application/octet-stream"
    missing_bytes: int = 0
    requests: list[str] = field(default_factory=list)

    def serve(self, name: str, content: bytes) -> str:
        """Offer ``content`` at an address like OpenAI's, which holds its digest; return it."""
        path = f"/clip/models/{hashlib.sha256(content).hexdigest()}/{name}"
        self.files[path] = content
        return self.url + path


@contextmanager
def serving() -> Iterator[Server]:
    """Run a ``Server`` in a thread."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(self.path)
            content = server.files.get(self.path, b"")
            self.send_response(server.status)
            self.send_header("Content-Type", server.content_type)
            self.send_header("Content-Length", str(len(content) + server.missing_bytes))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = Server(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        listener.shutdown()
        thread.join()


@dataclass
class Quantised:
    """A quantised tower: the file's content and, per matrix, the numbers it was made of."""

    model: bytes
    plain: dict[str, np.ndarray]
    matrices: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def quantised_tower(width: int = 8, layers: int = 2, embed: int = 4) -> Quantised:
    """An ONNX file with the node and constant names of the tower on the registry."""
    rng = np.random.default_rng(0)
    plain = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (5, width),
        "vision_model.pre_layrnorm.weight": (width,),
        "vision_model.pre_layrnorm.bias": (width,),
        "vision_model.post_layernorm.weight": (width,),
        "vision_model.post_layernorm.bias": (width,),
    }
    sizes = {"visual_projection": (width, embed)}
    for i in range(layers):
        layer = f"vision_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes[f"{layer}.self_attn.{part}"] = (width, width)
            plain[f"{layer}.self_attn.{part}.bias"] = (width,)
        sizes[f"{layer}.mlp.fc1"] = (width, 4 * width)
        sizes[f"{layer}.mlp.fc2"] = (4 * width, width)
        plain[f"{layer}.mlp.fc1.bias"] = (4 * width,)
        plain[f"{layer}.mlp.fc2.bias"] = (width,)
        for norm in ("layer_norm1", "layer_norm2"):
            plain[f"{layer}.{norm}.weight"] = plain[f"{layer}.{norm}.bias"] = (width,)
    values = {k: rng.standard_normal(s).astype(np.float32) for k, s in plain.items()}
    matrices, nodes, constants = {}, [], dict(values)
    for number, (layer, (rows, columns)) in enumerate(sizes.items(), start=1500):
        codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        scale = rng.uniform(0.001, 0.01, columns).astype(np.float32)
        zero = rng.integers(-3, 4, columns).astype(np.int8)
        matrices[layer] = codes, scale, zero
        name = f"onnx::MatMul_{number}"
        constants |= {f"{name}_quantized": codes, f"{name}_scale": scale}
        constants[f"{name}_zero_point"] = zero
        # The exporter writes "layers.0" where everything else is separated by slashes.
        path = "/" + layer.replace(".", "/").replace("layers/", "layers.")
        inputs = [f"{path}/x", f"{name}_quantized", f"{path}/x_zero", f"{name}_zero_point"]
        nodes += [
            helper.make_node("MatMulInteger", inputs, [f"{path}/y"], f"{path}/MatMul_quant"),
            helper.make_node("Cast", [f"{path}/y"], [f"{path}/z"], f"{path}/Cast", to=1),
        ]
    initializers = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    model = onnx.helper.make_model(helper.make_graph(nodes, "tower", [], [], initializers))
    return Quantised(model.SerializeToString(), values, matrices)


def make_wheel(folder: Path, content: bytes, *, name: str = "fakeclip") -> Wheel:
    """Put a wheel that pip accepts into ``folder``, with ``content`` as its one data file."""
    member, info = f"{name}/tower.onnx", f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": b"raise RuntimeError('imported')\n",
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        "Requires-Dist: does-not-exist-anywhere\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    record = "".join(f"{path},{_record_hash(data)},{len(data)}\n" for path, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in files.items():
            archive.writestr(entry, data)
    digests = [hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), content)]
    return Wheel(f"{name}==1.0", digests[0], member, digests[1])


def _record_hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"


def only_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder that is all pip gets to see."""
    index = folder / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return index
