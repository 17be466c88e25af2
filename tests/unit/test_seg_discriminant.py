"""What labels look like in one image, against the textbook's Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipes.seg.discriminant import Discriminant

DIM, LABELS, WEIGHT = 5, 4, 0.1


def covariance(rng: np.random.Generator) -> np.ndarray:
    root = rng.normal(size=(DIM, 2 * DIM))
    return root @ root.T / DIM


@pytest.fixture
def known() -> dict[str, np.ndarray]:
    """Means of labels, the covariance within them and that between images; the last is unseen."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(LABELS, DIM)) * 3
    means[3] = 0
    return {"means": means, "within": covariance(rng), "between": 0.3 * covariance(rng)}


@pytest.fixture
def discriminant(known: dict[str, np.ndarray]) -> Discriminant:
    made = Discriminant(DIM, LABELS, adapts=True)
    root = np.linalg.cholesky(np.linalg.inv(known["within"]))
    between, vectors = np.linalg.eigh(root.T @ known["between"] @ root)
    directions = WEIGHT * known["means"] @ np.linalg.inv(known["within"])
    parts = {
        "directions": directions,
        "offsets": -(directions * known["means"]).sum(1) / 2,
        "weight": np.array([WEIGHT]),
        "means": known["means"] @ root @ vectors,
        "axes": root @ vectors,
        "between": between,
    }
    made.load_state_dict({name: torch.from_numpy(part).float() for name, part in parts.items()})
    return made


def an_image(patches: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens, and answers: 90 % of one label, 10 % of another; traces of the rest."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(patches, DIM, generator=generator) * 2
    probs = torch.full((patches, LABELS), 0.01)
    probs[:, 0] = 0.97
    probs[: patches // 10] = torch.tensor([0.02, 0.95, 0.015, 0.015])
    return tokens, probs


def test_means_become_what_is_most_probable(
    discriminant: Discriminant, known: dict[str, np.ndarray]
) -> None:
    """In the tokens' own basis: m + B (B + S / n)^-1 (what the image says - m)."""
    tokens, probs = an_image()
    x, p = tokens.double().numpy(), probs.double().numpy()
    inverse = np.linalg.inv(known["within"])
    want = np.zeros((len(x), LABELS))
    for label in (0, 1):
        share = p[:, label].mean()
        worth = 40 * share**2 / (share + 0.08)
        mean, own = known["means"][label], p[:, label] @ x / p[:, label].sum()
        gain = known["between"] @ np.linalg.inv(known["between"] + known["within"] / worth)
        moved = mean + gain @ (own - mean)
        scores = [x @ inverse @ m - m @ inverse @ m / 2 for m in (moved, mean)]
        want[:, label] = WEIGHT * (scores[0] - scores[1])
    got = discriminant.change(tokens, probs).numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want[:, :2]).max() > 0.1


def test_a_label_that_is_nowhere_sure_stays_as_it_is(discriminant: Discriminant) -> None:
    tokens, probs = an_image()
    assert not discriminant.change(tokens, probs)[:, 2:].any()
    probs[:3, 2] = 0.49  # the surest 2 %
    assert not discriminant.change(tokens, probs)[:, 2].any()
    probs[:3, 2] = 0.51
    assert bool(discriminant.change(tokens, probs)[:, 2].any())
    probs[:, 3] = 0.9  # a label of which no mask ever said anything
    assert not discriminant.change(tokens, probs)[:, 3].any()


def test_a_finer_grid_says_no_more(discriminant: Discriminant) -> None:
    tokens, probs = an_image()
    change = discriminant.change(tokens, probs)
    fine = discriminant.change(tokens.repeat_interleave(4, 0), probs.repeat_interleave(4, 0))
    torch.testing.assert_close(fine, change.repeat_interleave(4, 0), rtol=1e-4, atol=1e-5)


def test_images_that_do_not_differ_change_nothing(discriminant: Discriminant) -> None:
    discriminant.between.zero_()
    tokens, probs = an_image()
    assert not discriminant.change(tokens, probs).any()
