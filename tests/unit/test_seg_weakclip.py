"""WeakCLIP's modules and losses against their published numbers, loops, and plain tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional

from clipes.config import WeakClipPreset
from clipes.datasets import VOC_CLASSES
from clipes.errors import VocabularyError
from clipes.seg.frozen import TokenInput
from clipes.seg.weakclip import (
    BACKGROUND,
    LearntContexts,
    MappedVectors,
    WeakClip,
    WeakClipSpec,
    cosines,
)
from clipes.seg.weakclip_layers import Attention, CoAttention
from clipes.seg.weakclip_loss import (
    boundary_loss,
    divergence,
    identity_loss,
    probabilities,
    seeding_loss,
    smoothed,
)
from clipes.towers.clip_text import ContextEncoder
from clipes.towers.load import load_text
from clipes.types import IGNORE
from clipes.weights import read_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")

CRF = WeakClipPreset("test").boundary_crf
SMALL = WeakClipSpec(
    ("cat", "dog"), channels=12, embed=8, contexts=0, words_width=0, norm="group", side=0
)

PLUS = replace(SMALL, beside=(TokenInput("dino.2", 6),))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def size(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def small(spec: WeakClipSpec = SMALL) -> WeakClip:
    torch.manual_seed(0)
    model = spec.build().eval()
    if isinstance(model.words, MappedVectors):
        model.words.keep(functional.normalize(torch.randn(spec.labels, spec.embed), dim=1))
    return model


def tokens(spec: WeakClipSpec, grids: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    patches = sum(h * w for h, w in grids)
    counts = [patches] * (len(spec.inputs) - 1) + [len(grids)]
    found = [
        torch.randn(count, one.width, generator=generator)
        for count, one in zip(counts, spec.inputs, strict=True)
    ]
    return torch.tensor(grids), *found


# --- sizes


@pytest.mark.parametrize(("classes", "count"), [(20, 14_152_981), (90, 14_242_651)])
def test_all_but_the_adapter_has_the_published_size(classes: int, count: int) -> None:
    model = WeakClipSpec(names(classes)).build()
    assert size(model) - size(model.adapter) == count
    assert size(model.adapter) == 7_087_872
    assert size(model.words) == 4_096
    shares = model.match.gamma.numel() + model.match.beta.numel()
    assert (size(model.match) - shares, shares) == (6_840_832, 1_024)


def test_neck_and_head_have_the_published_sizes_and_in_the_code_most_of_the_match_is_dead() -> None:
    model = WeakClipSpec(names(20), chained=False).build()
    head = size(model.decoder.scales) + size(model.decoder.classify)
    assert (size(model.decoder) - head, head) == (3_169_280, 4_137_749)
    assert sum(map(size, model.match.unused())) == 4_207_616
    assert size(model) - size(model.adapter) - 4_207_616 == 9_945_365
    assert size(model) - 4_207_616 == 17_033_237
    assert not WeakClipSpec(names(20)).build().match.unused()


def test_levels_have_their_strides_and_the_finest_says_at_which_answers_come() -> None:
    for blocks, cells in (((4, 6, 8, 12), (16, 20)), ((6, 8, 12), (8, 10)), ((8, 12), (4, 5))):
        model = small(replace(SMALL, blocks=blocks))
        logits, scores = model(*tokens(model.spec, [(4, 5)]))
        assert logits.shape == (1, 3, *cells)
        assert scores.shape == (1, 3, 4, 5)
        levels = model.adapter(torch.randn(1, 12, 4, 5) for _ in blocks)
        sizes = [tuple(one.shape[2:]) for one in levels]
        assert sizes == [(16, 20), (8, 10), (4, 5), (2, 3)][-len(blocks) :]


# --- first weights


def test_first_weights_are_the_published() -> None:
    torch.manual_seed(0)
    model = WeakClipSpec(names(20)).build().requires_grad_(False)
    reads = model.match.read_words[1]
    assert float(reads.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert not reads.bias.any()
    assert bool((model.match.gamma == 0.1).all())
    assert bool((model.match.beta == 0.1).all())
    # Kaiming by the outputs: variance 2 / (256 * 9).
    smooth, scale = model.decoder.smooth[0], model.decoder.scales[0][0]
    for conv in (smooth, scale):
        assert float(conv.weight.std()) == pytest.approx(math.sqrt(2 / 2304), rel=0.02)
    assert not smooth.bias.any()
    # torch's own: within 1 / sqrt(inputs).
    assert float(model.decoder.classify.weight.abs().max()) <= 1 / 16
    assert model.decoder.classify.bias.any()
    assert isinstance(model.words, LearntContexts)
    assert float(model.words.contexts.std()) == pytest.approx(0.88, abs=0.05)  # cut at 2
    assert isinstance(model.adapter.levels[0][2], nn.BatchNorm2d)


def test_the_map_of_constant_words_starts_as_the_identity() -> None:
    model = small()
    assert isinstance(model.words, MappedVectors)
    assert torch.equal(model.words(), model.words.vectors)
    torch.testing.assert_close(model.words.vectors.norm(dim=1), torch.full((3,), 10.0))
    model.words().sum().backward()
    assert bool(model.words.map.weight.grad.any())


# --- the match


def test_attention_is_of_four_heads_at_an_eighth() -> None:
    torch.manual_seed(0)
    attention = Attention().eval()
    some, memory = torch.randn(1, 3, 256), torch.randn(1, 5, 256)
    query, key, value = attention.query(some), attention.key(memory), attention.value(memory)
    mixed = torch.empty(1, 3, 256)
    for first in range(0, 256, 64):
        head = slice(first, first + 64)
        share = (query[0, :, head] @ key[0, :, head].T / 8).softmax(1)
        mixed[0, :, head] = share @ value[0, :, head]
    torch.testing.assert_close(attention(some, memory), attention.mix(mixed))


def test_without_shares_the_match_is_clips_own_cosine() -> None:
    model = small()
    nn.init.zeros_(model.match.gamma)
    nn.init.zeros_(model.match.beta)
    grids, *given = tokens(SMALL, [(4, 5)])
    _, scores = model(grids, *given)
    joint = functional.normalize(given[-2], dim=1)
    expected = functional.normalize(model.words(), dim=1) @ joint.T
    torch.testing.assert_close(scores[0].flatten(1), expected)


def test_cosines_are_within_one() -> None:
    model = small()
    grids, *given = tokens(SMALL, [(6, 7)])
    _, scores = model(grids, *(100 * one for one in given))
    assert scores.abs().max().item() <= 1 + 1e-6
    assert cosines(torch.zeros(1, 2, 4), torch.ones(1, 3, 4)).isfinite().all()


@pytest.mark.parametrize("chained", [True, False])
def test_all_layers_learn_when_chained_and_only_the_last_in_the_code(chained: bool) -> None:
    torch.manual_seed(0)
    match = CoAttention(8, 3, chained=chained)
    words, pixels = match(torch.randn(2, 3, 8), torch.randn(2, 7, 8))
    (words.sum() + pixels.square().sum()).backward()
    learns = [
        [any(one.grad is not None for one in layer.parameters()) for layer in side]
        for side in (match.of_words, match.of_pixels)
    ]
    assert learns == [[chained, chained, True]] * 2


def test_layers_follow_each_other_with_the_same_memory() -> None:
    torch.manual_seed(0)
    match = CoAttention(8, 3, chained=True).eval()
    words, pixels = torch.randn(1, 3, 8), torch.randn(1, 7, 8)
    text, image = match.read_words(words), match.read_pixels(pixels)
    one, two, three = match.of_words
    expected = words + 0.1 * match.write_words(three(two(one(text, image), image), image))
    torch.testing.assert_close(match(words, pixels)[0], expected)


# --- images and classes


@pytest.mark.parametrize("spec", [SMALL, PLUS], ids=["clip", "two towers"])
@pytest.mark.parametrize("grids", [[(3, 4), (5, 2), (1, 1)], [(3, 5), (3, 5)]])
def test_an_image_does_not_see_the_others_of_its_batch(
    grids: list[tuple[int, int]], spec: WeakClipSpec
) -> None:
    model = small(spec)
    _, *given = tokens(spec, grids)
    together = model(torch.tensor(grids), *given)
    count, start = len(grids), 0
    for index, (h, w) in enumerate(grids):
        own = [one[start : start + h * w] for one in given[:-1]]
        alone = model(torch.tensor([(h, w)]), *own, given[-1][index : index + 1])
        start += h * w
        for mine, theirs in zip(alone, (together[index], together[count + index]), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_permuted_classes_give_permuted_answers(seed: int) -> None:
    spec = replace(SMALL, classes=names(5))
    model = small(spec)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    given = tokens(spec, [(4, 3)])
    with torch.no_grad():
        nn.init.normal_(model.words.map.weight, std=0.1)
        plain = model(*given)
        model.words.vectors.copy_(model.words.vectors[order])
        for lateral in model.decoder.laterals:  # the last of what they read are scores, by label
            lateral.weight[:, 12:] = lateral.weight[:, 12:][:, order].clone()
        model.decoder.classify.weight.copy_(model.decoder.classify.weight[order])
        model.decoder.classify.bias.copy_(model.decoder.classify.bias[order])
        permuted = model(*given)
    for before, after in zip(plain, permuted, strict=True):
        torch.testing.assert_close(after, before[:, order], rtol=1e-4, atol=1e-5)


def test_another_tower_is_read_beside_the_scores_of_every_level_normed() -> None:
    model, alone = small(PLUS), small()
    grids, *given = tokens(PLUS, [(4, 5)])
    alone_given = given[:-3] + given[-2:]
    shared = {name: one for name, one in model.state_dict().items() if "laterals" not in name}
    alone.load_state_dict(shared, strict=False)
    for mine, theirs in zip(model.decoder.laterals, alone.decoder.laterals, strict=True):
        assert mine.in_channels == theirs.in_channels + 6
        theirs.load_state_dict({"weight": mine.weight[:, :-6], "bias": mine.bias})
    with torch.no_grad():
        seen = model(grids, *given)[0]
        far = [*given[:-3], 5 * given[-3] + 2, *given[-2:]]
        torch.testing.assert_close(model(grids, *far)[0], seen, rtol=1e-3, atol=1e-3)
        assert float((seen - alone(grids, *alone_given)[0]).abs().max()) > 0.01
        for lateral in model.decoder.laterals:
            others = lateral.weight[:, -6:].abs().sum((0, 2, 3))
            assert bool((others > 0).all())
            lateral.weight[:, -6:] = 0
        unseen = zip(model(grids, *given), alone(grids, *alone_given), strict=True)
    for with_it, without in unseen:
        torch.testing.assert_close(with_it, without)


def test_what_no_model_can_be_built_of_is_said() -> None:
    assert not PLUS.problem()
    assert PLUS.name == "WeakCLIP on 4 blocks and dino.2"
    assert "windows with a second tower" in replace(PLUS, side=64).problem()
    assert "of no size that there is" in replace(PLUS, beside=(TokenInput("a", 0),)).problem()


# --- words of a text tower


@pytest.fixture(scope="module")
def text() -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(context_length=77, width=16, heads=2, layers=2, output_dim=8)
    nn.init.normal_(tower.text_projection, std=0.3)
    return tower.eval()


def test_ends_of_text_are_where_they_were_published(text: TextTransformer) -> None:
    names = (BACKGROUND, *VOC_CLASSES)
    ends = dict(zip(names, ContextEncoder(text, names).ends(8).tolist(), strict=True))
    longer = {"aeroplane": 11, "tvmonitor": 11, "diningtable": 12, "pottedplant": 12}
    assert {name: end for name, end in ends.items() if end != 10} == longer


def test_a_gradient_reaches_the_contexts_and_nothing_else_of_the_words(
    text: TextTransformer,
) -> None:
    encoder = ContextEncoder(text, (BACKGROUND, *SMALL.classes))
    model = small(replace(SMALL, contexts=8, words_width=16)).train()
    assert isinstance(model.words, LearntContexts)
    model.words.lend(encoder)
    grids, *given = tokens(SMALL, [(4, 5)])
    model(grids, *given)[1].sum().backward()
    assert bool(model.words.contexts.grad.any())
    assert all(one.grad is None for one in text.parameters())
    assert [name for name, _ in model.words.named_parameters()] == ["contexts"]
    assert set(model.words.state_dict()) == {"contexts", "features"}


def test_a_gradient_reaches_the_contexts_through_a_whole_text_tower(tiny_weights: Path) -> None:
    tower = load_text(read_state_dict(tiny_weights))
    encoder = ContextEncoder(tower, (BACKGROUND, *SMALL.classes))
    contexts = torch.randn(8, encoder.width, requires_grad=True)
    encoder(contexts)[2].sum().backward()  # of the last class: the contexts are everybody's
    assert contexts.grad is not None
    assert bool(contexts.grad.abs().sum(1).all())
    assert all(one.grad is None and not one.requires_grad for one in tower.parameters())


def test_permuted_names_have_permuted_features(text: TextTransformer) -> None:
    contexts = torch.randn(8, 16)
    features = ContextEncoder(text, VOC_CLASSES)(contexts)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    moved = ContextEncoder(text, [VOC_CLASSES[label] for label in order])(contexts)
    torch.testing.assert_close(moved, features[order])


def test_contexts_stand_between_the_start_and_the_name(text: TextTransformer) -> None:
    encoder = ContextEncoder(text, ("dog",))
    pieces = text.token_embedding(encoder._tokens[0])
    as_learnt = encoder(pieces[1:2])  # "dog dog"
    twice = torch.cat([pieces[:2], pieces[1:]])[None] + text.positional_embedding[:4]
    hidden = text.transformer(twice, attn_mask=text.attn_mask[:4, :4])
    expected = text.ln_final(hidden)[:, 3] @ text.text_projection
    torch.testing.assert_close(as_learnt, expected)


def test_what_is_kept_of_the_words_is_what_the_tower_says_last(text: TextTransformer) -> None:
    spec = replace(SMALL, contexts=8, words_width=16)
    model = small(spec)
    assert isinstance(model.words, LearntContexts)
    model.words.lend(ContextEncoder(text, (BACKGROUND, *SMALL.classes)))
    given = tokens(spec, [(4, 5)])
    with torch.no_grad():
        model.words.contexts.mul_(0.5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    alone = small(spec)
    alone.load_state_dict(saved)
    model.words.train()  # goes through the tower
    for with_tower, without in zip(model(*given), alone(*given), strict=True):
        torch.testing.assert_close(with_tower, without)


def test_names_that_do_not_fit_are_refused(text: TextTransformer) -> None:
    encoder = ContextEncoder(text, (" ".join(["cat"] * 70),))
    with pytest.raises(VocabularyError, match="80 tokens, CLIP reads 77"):
        encoder(torch.zeros(8, 16))


# --- losses


def some_probs(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return probabilities(torch.randn(1, 4, 6, 8, generator=generator), (6, 8))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_seeding_is_a_mean_over_background_plus_one_over_the_rest() -> None:
    probs, labels = some_probs(), torch.randint(0, 4, (1, 6, 8))
    labels[0, 0] = IGNORE
    weights = (labels != IGNORE).float()
    costs: dict[bool, list[float]] = {True: [], False: []}
    for row in range(1, 6):
        for column in range(8):
            label = int(labels[0, row, column])
            costs[label == 0].append(-math.log(probs[0, label, row, column]))
    expected = np.mean(costs[True]) + np.mean(costs[False])
    assert float(seeding_loss(probs, labels, weights)) == pytest.approx(expected, rel=1e-5)


def test_the_boundary_costs_nothing_where_the_crf_agrees() -> None:
    probs = some_probs()
    assert float(divergence(probs, probs)) == 0
    nothing = replace(CRF, gaussian_compat=0.0, bilateral_compat=0.0)
    assert float(boundary_loss(probs, picture(), nothing)) == pytest.approx(0, abs=1e-3)
    assert float(boundary_loss(probs, picture(), CRF)) > 0.05


def test_the_boundary_is_the_bounded_divergence_from_the_crfs_answer() -> None:
    logits = torch.randn(1, 4, 6, 8, requires_grad=True)
    probs = probabilities(logits, (6, 8))
    before = probs.detach().clone()
    q = smoothed(probs, picture(), CRF)
    assert not q.requires_grad
    assert torch.equal(probs, before)
    torch.testing.assert_close(q.sum(1), torch.ones(1, 6, 8))
    ratio = np.clip((q / probs).detach().numpy(), 0.05, 20)
    expected = (q.numpy() * np.log(ratio)).sum(1).mean()
    loss = boundary_loss(probs, picture(), CRF)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert bool(logits.grad.any())


def test_a_known_image_has_a_boundary_between_its_classes_alone() -> None:
    probs = some_probs()
    present = torch.tensor([False, True, False])
    known = probs[:, [0, 2]] / probs[:, [0, 2]].sum(1, keepdim=True)
    expected = boundary_loss(known, picture(), CRF)
    torch.testing.assert_close(boundary_loss(probs, picture(), CRF, present), expected)
    none = boundary_loss(probs, picture(), CRF, torch.zeros(3, dtype=torch.bool))
    assert float(none) == pytest.approx(0, abs=1e-6)


def test_identity_divides_by_all_pixels() -> None:
    scores = torch.rand(1, 4, 3, 4) * 2 - 1
    labels = torch.randint(0, 4, (1, 12, 16))
    labels[0, :6] = IGNORE
    enlarged = functional.interpolate(scores / 0.07, size=(12, 16), mode="bilinear")
    expected = functional.cross_entropy(enlarged, labels, ignore_index=IGNORE, reduction="sum")
    found = identity_loss(scores, labels, (labels != IGNORE).float())
    assert float(found) == pytest.approx(float(expected) / (12 * 16), rel=1e-5)


@pytest.mark.parametrize("label", [0, 1, IGNORE])
def test_views_of_one_kind_or_none_have_finite_losses(label: int) -> None:
    logits = torch.randn(1, 4, 6, 8, requires_grad=True)
    labels, cells = (torch.full((1, *size), label) for size in ((24, 32), (6, 8)))
    weights, counts = ((one != IGNORE).float() for one in (labels, cells))
    probs = probabilities(logits, (6, 8))
    loss = seeding_loss(probs, cells, counts) + identity_loss(logits, labels, weights)
    loss = loss + boundary_loss(probs, picture(), CRF)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": ()}, {"blocks": (1,) * 5}, {"channels": 1 << 20}, {"contexts": 77}, {"norm": "x"},
     {"normalise": "x"}, {"side": 100}, {"side": 1024}],
)  # fmt: skip
def test_specs_of_no_model_say_so(wrong: dict[str, object]) -> None:
    assert not SMALL.problem()
    assert replace(SMALL, **wrong).problem()
