"""The implicit walk against the matrix built in full, several affinities in one, and boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from clipes.bench import literal
from clipes.config import CamParams
from clipes.maps.affinity import blend, box_mask, likeness, propagate, sinkhorn, spread

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
    product = torch.linalg.matrix_power(literal.walk_matrix(attention, 3), power).numpy()
    got = spread(sinkhorn(attention, 3), cams, params, power)
    for cam, refined in zip(cams, got, strict=True):
        mask = box_mask(cam, params.box_threshold)
        expected = (product * mask.reshape(1, -1)) @ cam.reshape(-1)
        np.testing.assert_allclose(refined.reshape(-1), expected, rtol=1e-5)


def test_classes_do_not_influence_each_other() -> None:
    attention, cams = make_attention(), make_cams(4)
    walk = sinkhorn(attention, 3)
    together = propagate(walk, cams, CamParams(), 2)
    alone = [propagate(walk, cam[None], CamParams(), 2)[0] for cam in cams]
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
    walk = sinkhorn(make_attention(), 3)
    refined = propagate(walk, np.zeros((1, *GRID), np.float32), CamParams(), 2)
    assert (refined == 0).all()


def test_one_affinity_is_left_as_it_is() -> None:
    attention = make_attention()
    assert blend([(attention, 1.0)]) is attention
    assert blend([(make_attention(1), 0.0), (attention, 1.0)]) is attention


def test_several_affinities_are_one_by_the_geometric_mean_of_their_shares() -> None:
    given = [(make_attention(seed), weight) for seed, weight in ((0, 0.5), (1, 0.3), (2, 0.2))]
    kept = [affinity.clone() for affinity, _ in given]
    expected = torch.ones_like(kept[0])
    for affinity, weight in given:
        expected *= (affinity / affinity.sum(1, keepdim=True)) ** weight
    torch.testing.assert_close(blend(given), expected)
    # A row's factor is no matter of likeness, and what is blended stays as it was.
    scaled = [(affinity * torch.rand(len(affinity), 1), weight) for affinity, weight in given]
    torch.testing.assert_close(blend(scaled), expected)
    for (affinity, _), before in zip(given, kept, strict=True):
        torch.testing.assert_close(affinity, before, rtol=0, atol=0)


def test_patches_belong_together_only_as_far_as_all_towers_say_so() -> None:
    first = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    blended = blend([(first, 0.5), (torch.ones(3, 3), 0.5)])
    assert blended[0, 2] == 0
    assert blended[0, 0] == blended[0, 1] > 0


def test_patches_are_alike_by_the_angle_between_their_tokens() -> None:
    tokens = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    tokens[3] = 2 * tokens[1]
    got = likeness(tokens, 0.2)
    for i, a in enumerate(tokens.double()):
        for j, b in enumerate(tokens.double()):
            cosine = float(a @ b) / float(a.norm() * b.norm())
            assert float(got[i, j]) == pytest.approx(np.exp((cosine - 1) / 0.2), rel=1e-4)
    assert float(got[1, 3]) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(got, likeness(3 * tokens, 0.2))
