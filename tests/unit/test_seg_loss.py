"""The confidence-guided loss: where the cut is taken, and what is left when nothing is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clipes.seg.loss import Guidance, branch_targets, confident_labels, weighted_loss
from clipes.seg.resize import shrink
from clipes.types import IGNORE


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (2, 33, 41), generator=generator)
    labels[0, :5] = IGNORE
    confidence = torch.rand(2, 33, 41, generator=generator)
    logits = torch.randn(2, 4, 5, 6, generator=generator)
    return logits, labels, confidence


@pytest.mark.parametrize("size", [(5, 6), (33, 41), (17, 11)])
def test_labels_shrink_as_pillow_does_it(size: tuple[int, int]) -> None:
    _, labels, _ = batch()
    expected = [
        np.asarray(
            Image.fromarray(one.numpy().astype(np.uint8)).resize(
                size[::-1], Image.Resampling.NEAREST
            )
        )
        for one in labels
    ]
    assert np.array_equal(shrink(labels, size).numpy(), np.stack(expected))


def test_the_cut_is_taken_before_shrinking() -> None:
    # Bilinear shrinking would average the confidence of the two columns to 0.96: both kept.
    confidence = torch.tensor([[[1.0, 0.92]]]).repeat(1, 8, 4)
    labels = torch.ones(1, 8, 8, dtype=torch.int64)
    cut = confident_labels(labels, confidence, 0.95)
    assert cut[0, 0].tolist() == [1, IGNORE] * 4
    ((small, weight),) = branch_targets(cut, torch.ones(1, 8, 8), [(8, 4)])
    assert torch.equal(small, shrink(cut, (8, 4)))
    assert torch.equal(weight == 0, small == IGNORE)
    assert (small == IGNORE).any()


def test_the_threshold_itself_is_kept() -> None:
    labels = torch.zeros(1, 1, 2, dtype=torch.int64)
    cut = confident_labels(labels, torch.tensor([[[0.95, 0.9499]]]), 0.95)
    assert cut.tolist() == [[[0, IGNORE]]]


@pytest.mark.parametrize("soft", [False, True])
def test_what_is_not_learnt_weighs_nothing(soft: bool) -> None:
    _, labels, confidence = batch()
    cut, weights = Guidance(threshold=0.5, soft=soft).weigh(labels, confidence)
    assert (cut == IGNORE).sum() > (labels == IGNORE).sum() > 0
    assert torch.equal(weights == 0, cut == IGNORE)
    learnt = cut != IGNORE
    assert torch.equal(weights[learnt], confidence[learnt] if soft else torch.ones(learnt.sum()))


def test_ce_is_the_mean_over_labelled_pixels() -> None:
    logits, labels, _ = batch()
    ((small, weight),) = branch_targets(labels, torch.ones(labels.shape), [(5, 6)])
    expected = functional.cross_entropy(logits, small, ignore_index=IGNORE)
    torch.testing.assert_close(weighted_loss(logits, small, weight) / weight.sum(), expected)


def test_soft_is_the_weighted_mean_pixel_by_pixel() -> None:
    logits, labels, confidence = batch()
    ((small, weight),) = branch_targets(labels, confidence, [(5, 6)])
    total, norm = 0.0, 0.0
    log_probs = logits.double().log_softmax(1)
    sure = shrink(confidence, (5, 6)).double()
    for n in range(2):
        for y in range(5):
            for x in range(6):
                if small[n, y, x] != IGNORE:
                    total -= float(sure[n, y, x] * log_probs[n, small[n, y, x], y, x])
                    norm += float(sure[n, y, x])
    found = weighted_loss(logits, small, weight) / weight.sum()
    assert float(found) == pytest.approx(total / norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_ignored_pixels_costs_nothing(dtype: torch.dtype) -> None:
    logits = (1e4 * torch.randn(2, 4, 5, 6)).to(dtype).requires_grad_()
    labels = torch.full((2, 33, 41), IGNORE)
    ((small, weight),) = branch_targets(labels, torch.ones(2, 33, 41), [(5, 6)])
    loss = weighted_loss(logits, small, weight)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())
