"""The implicit walk against the matrix built in full, and the reference's boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from clipes.bench import literal
from clipes.config import CamParams
from clipes.maps.affinity import box_mask, propagate, refine, sinkhorn

GRID = (6, 9)


def make_attention(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    patches = GRID[0] * GRID[1]
    return torch.randn(patches, patches, generator=generator).softmax(1)


def make_cams(classes: int) -> np.ndarray:
    return np.random.default_rng(classes).random((classes, *GRID), dtype=np.float32)


def test_steps_of_the_walk_equal_products_with_the_matrix() -> None:
    attention = make_attention()
    matrix = literal.walk_matrix(attention, 3)
    walk = sinkhorn(attention, 3)
    torch.testing.assert_close(walk.step(torch.eye(len(matrix))), matrix, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(matrix, matrix.T)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_propagation_equals_masking_the_columns_of_the_power(power: int) -> None:
    attention, cams = make_attention(), make_cams(3)
    params = CamParams()
    spread = torch.linalg.matrix_power(literal.walk_matrix(attention, 3), power).numpy()
    got = propagate(sinkhorn(attention, 3), cams, params, power)
    for cam, refined in zip(cams, got, strict=True):
        mask = box_mask(cam, params.box_threshold)
        expected = (spread * mask.reshape(1, -1)) @ cam.reshape(-1)
        np.testing.assert_allclose(refined.reshape(-1), expected, rtol=1e-5)


def test_classes_do_not_influence_each_other() -> None:
    attention, cams = make_attention(), make_cams(4)
    together = refine(attention, cams, CamParams())
    alone = [refine(attention, cam[None], CamParams())[0] for cam in cams]
    np.testing.assert_allclose(together, alone, atol=1e-4)  # scaling magnifies rounding


@pytest.mark.parametrize("seed", range(20))
def test_boxes_equal_those_of_connected_components(seed: int) -> None:
    cam = np.random.default_rng(seed).random((9, 13), dtype=np.float32) ** 3
    levels = (255 * cam).astype(np.uint8)
    strong = levels > int(0.4 * levels.max())
    components, _ = ndimage.label(strong, np.ones((3, 3)))
    expected = np.zeros_like(levels)
    for box in ndimage.find_objects(components):
        expected[box] = 1
    # Contours of holes have boxes too, but inside the component's own.
    np.testing.assert_array_equal(box_mask(cam, 0.4), expected)


def test_the_reference_never_puts_the_last_row_and_column_in_a_box() -> None:
    cam = np.zeros((5, 7), np.float32)
    cam[3:, 4:] = 1
    ours = box_mask(cam, 0.4)
    theirs = box_mask(cam, 0.4, last_row_in_box=False)
    assert ours[-1].any()
    assert ours[:, -1].any()
    assert not theirs[-1].any()
    assert not theirs[:, -1].any()
    np.testing.assert_array_equal(ours[:-1, :-1], theirs[:-1, :-1])


def test_an_empty_map_stays_empty() -> None:
    refined = refine(make_attention(), np.zeros((1, *GRID), np.float32), CamParams())
    assert (refined == 0).all()
