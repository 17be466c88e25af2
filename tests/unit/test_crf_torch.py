"""The dense CRF on torch devices: the numba backend's result, the same bits, and on one device."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from clipes import crf_torch
from clipes.bench.crf import synthetic_image
from clipes.config import CrfParams
from clipes.crf import dense_crf
from clipes.crf_torch import dense_crf_torch, mean_field
from clipes.errors import BackendError
from clipes.lattice import TILE, build_lattice
from clipes.lattice_torch import _split, build_torch_lattice

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def _picture(kind: str, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "photo" and min(height, width) > 20:
        return synthetic_image(height, width)
    image = np.full((height, width, 3), 200, np.uint8)
    if kind == "halves":
        image[:, width // 2 :] = 30
    return image


def _scores(labels: int, height: int, width: int) -> np.ndarray:
    """Return noise that leans towards another label in each column of a grid: (L, H, W)."""
    scores = np.random.default_rng(1).random((labels, height, width), dtype=np.float32)
    for column in range(width):
        scores[column * 5 // width % labels, :, column] += 0.3
    return scores / scores.sum(0)


# --- against numba


@pytest.mark.parametrize("kind", ["photo", "noise", "constant", "halves"])
@pytest.mark.parametrize(
    ("size", "labels"),
    [((1, 1), 2), ((1, 300), 3), ((300, 1), 2), ((7, 5), 4), ((90, 120), 2), ((60, 80), 21)],
)
def test_it_is_the_numba_backend(kind, size, labels):
    image, scores = _picture(kind, *size), _scores(labels, *size)
    ours = dense_crf_torch(scores, image, CrfParams(), CPU)
    numba = dense_crf(scores, image)
    # Where everything is noise, some pixels hang in the balance, and rounding tips it.
    tolerance = 5e-4 if kind == "noise" else 2e-5
    np.testing.assert_allclose(ours, numba, atol=tolerance)
    assert np.abs(ours - numba).mean() < 1e-6
    highest = np.sort(numba, 0)
    clear = highest[-1] - highest[-2] > 2 * tolerance
    np.testing.assert_array_equal(ours.argmax(0)[clear], numba.argmax(0)[clear])


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_points_lie_in_the_same_simplices(d):
    # Not nearly: the same bits. Half of the points lie on the faces between simplices.
    points = np.random.default_rng(d).uniform(0, 30, (d, 640)).astype(np.float32)
    points[:, ::2] = np.rint(points[:, ::2])
    numba = build_lattice(points, points.shape[1])
    ours = build_torch_lattice(torch.from_numpy(points), points.min(1), points.max(1))
    assert points.shape[1] % TILE == 0
    assert ours.neighbours[0].shape[0] == 2 * (numba.rows - 1)
    np.testing.assert_array_equal(ours.weights.view(-1, d + 1).numpy(), numba.weights)
    rows = ours.rows.view(-1, d + 1).numpy()
    pairs = np.unique(np.stack([rows.ravel(), numba.corners.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(rows)) == len(np.unique(numba.corners))
    values = np.random.default_rng(0).random(points.shape[1], dtype=np.float32)
    filtered = ours.filter(torch.from_numpy(values)[:, None])[:, 0]
    np.testing.assert_allclose(filtered, numba.filter(values), rtol=2e-6)


@pytest.mark.parametrize("longest", [1, 2, 3, 50])
def test_lists_are_cut_into_short_parts(longest):
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 7, 1])
    parts, lists = _split(lengths, longest)
    ends = lengths.cumsum(0).tolist()
    assert parts[0] == 0
    assert 0 < parts.diff().min() <= parts.diff().max() <= longest
    assert parts[lists.long()].tolist() == [0, *ends, ends[-1]]
    assert len(parts) == 1 + sum(-(-length // longest) for length in lengths.tolist())


# --- the same every time, on one device


@pytest.mark.parametrize("kind", ["photo", "constant"])
def test_every_run_gives_the_same_bytes(kind):
    image, scores = _picture(kind, 90, 120), _scores(3, 90, 120)
    first = dense_crf_torch(scores, image, CrfParams(), CPU)
    crf_torch._smoothness.cache_clear()
    torch.set_num_threads(2)
    again = dense_crf_torch(scores, image, CrfParams(), CPU)
    assert first.tobytes() == again.tobytes()


def test_nothing_leaves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors that have a shape and a device, but no content: they cannot meet those of another
    # device, and no value can be read from them; sizes can.
    monkeypatch.setattr(crf_torch, "CACHED_PIXELS", 0)  # lest they stay in the cache
    sizes = ShapeEnv(allow_scalar_outputs=False)
    with FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=False), torch.inference_mode():
        scores = torch.empty(3, 20, 30, device="cuda:0")
        image = torch.empty(20, 30, 3, dtype=torch.uint8, device="cuda:0")
        try:
            result = mean_field(scores, image, CrfParams())
        except DynamicOutputShapeException as missing:
            pytest.skip(f"this torch does not know the shape of what it would return: {missing}")
    assert result.device == torch.device("cuda:0")
    assert result.shape == scores.shape
    assert result.dtype == torch.float32


class Calls(TorchDispatchMode):
    """Notes which of torch's operations are called, and that none adds up floats by a scan."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names.add(name)
        assert name != "cumsum" or not args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


def test_nothing_is_added_atomically() -> None:
    # These give other bits in each run on a GPU (the notes of torch.use_deterministic_algorithms).
    image, scores = _picture("photo", 30, 40), _scores(3, 30, 40)
    with Calls() as calls:
        mean_field(torch.from_numpy(scores), torch.from_numpy(image), CrfParams(iterations=1))
    assert "_embedding_bag_forward_only" in calls.names
    assert not calls.names & {"index_add", "index_add_", "scatter_add", "scatter_add_", "put_"}
    assert not calls.names & {"scatter_reduce", "scatter_reduce_", "_sparse_mm", "bincount"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["photo", "noise", "constant"])
def test_a_gpu_gives_the_same_result(kind):
    image, scores = _picture(kind, 150, 200), _scores(4, 150, 200)
    results = [dense_crf_torch(scores, image, CrfParams(), torch.device("cuda")) for _ in range(3)]
    assert len({result.tobytes() for result in results}) == 1
    tolerance = 1e-3 if kind == "noise" else 1e-4
    np.testing.assert_allclose(results[0], dense_crf(scores, image), atol=tolerance)


def test_a_full_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(crf_torch, "mean_field", full)
    with pytest.raises(BackendError, match=r"cpu has .* 5 x 4 pixels and 2 labels.*numba"):
        dense_crf_torch(_scores(2, 4, 5), _picture("noise", 4, 5), CrfParams(), CPU)


# --- what others pay for it


def test_the_other_backends_do_not_import_torch():
    code = (
        "import sys, numpy as np\n"
        "from clipes.crf import dense_crf\n"
        "from clipes.stages.refine import refine\n"
        "dense_crf(np.full((2, 4, 4), 0.5, np.float32), np.zeros((4, 4, 3), np.uint8))\n"
        "print('torch' in sys.modules)\n"
        "dense_crf(np.full((2, 4, 4), 0.5), np.zeros((4, 4, 3), np.uint8), backend='torch')\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
