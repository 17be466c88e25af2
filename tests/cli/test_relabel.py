"""relabel as a user runs it, on small random towers, and what later stages make of its masks."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clipes
from clipes.config import get_preset
from clipes.disk.images import read_mask, read_origin, write_confidence, write_mask
from clipes.run.folder import Run
from clipes.run.origin import RelabelOrigin
from clipes.run.reopen import reopen
from clipes.seg.checkpoint import load_checkpoint
from clipes.seg.frozen import flat_tokens
from clipes.types import CamMaps
from tests.cli.inline import ends
from tests.cli.small_data import CLASSES, write_clip, write_refined
from tests.cli.test_train_frozen import FROZEN
from tests.dino_support import write_dino

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 5
TOWERS = ["--weights", "clip.safetensors", "--dino", "dino.safetensors"]
RELABEL = ["relabel", "run", "--from", "a.pt", *TOWERS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with masks and confidence, a checkpoint of it (``a.pt``), and another (``b.pt``)."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_clip(place / "clip.safetensors", place / "text.npz", layers=12)
        write_dino(place / "dino.safetensors")
        run = write_refined(place / "run", place / "photos", COUNT)
        for id_ in run.ids("pseudo"):
            write_confidence(run.confidence_path(id_), np.full((48, 64), 0.97, np.float32))
        ends(0, *FROZEN, "--iterations", 2, "--out", "other", "--seed", 1)
        ends(0, *FROZEN, "--iterations", 2)
    make_outspoken(run.root / "checkpoints" / "final.pt", run.root / "tokens", place / "a.pt")
    make_outspoken(
        place / "other" / "checkpoints" / "final.pt", run.root / "tokens", place / "b.pt"
    )
    return place


def make_outspoken(checkpoint: Path, tokens: Path, out: Path) -> None:
    """Copy a checkpoint that hardly learnt so that it names every label somewhere."""
    model = load_checkpoint(checkpoint).build().eval()
    for part in model.discriminant.buffers():  # what it started from knows too few answers
        part.zero_()
    torch.nn.init.normal_(model.classify.weight, generator=torch.Generator().manual_seed(0))
    seen = []
    for path in sorted(tokens.iterdir()):
        grid, flat = flat_tokens(load_file(path), model.spec)
        seen.append(model(torch.tensor([grid]), *flat)[0].flatten(2)[0])
    logits = torch.cat(seen, 1).detach()
    content = torch.load(checkpoint, weights_only=True)
    spread = logits.std(1).clamp(min=1e-6)
    content["weights"]["classify.weight"] = model.classify.weight.detach() * (3 / spread)[:, None]
    bias = content["weights"]["classify.bias"]
    content["weights"]["classify.bias"] = (bias - logits.mean(1)) * 3 / spread
    for name in ("directions", "offsets"):
        content["weights"][f"discriminant.{name}"].zero_()
    torch.save(content, out)


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    made = Run(Path("run"))
    made.note_fact("cam", "root", str(Path("photos").absolute()))
    return made


def give_maps(run: Run, origin: str = "") -> None:
    """Put maps into the run: every class lies left of the middle."""
    cam = run.stage("cam")["settings"] | {"preset": get_preset("fast").to_dict()}
    run.begin("cam", cam, "clipes cam", {"root": str(Path("photos").absolute())}, anew=True)
    for sample in reopen(run, None).samples:
        labels = np.array(sorted(sample.labels))
        maps = np.zeros((len(labels), 3, 4), np.float16)
        maps[:, :, :2] = 1
        run.save_cams(sample.id, CamMaps(labels, maps, (48, 64)), origin=origin)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_masks_hold_what_images_have_and_lie_beside_the_others(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(run.root)
    ends(0, "predict", "a.pt", "photos/images", "--out", "any", *TOWERS)
    said = {path.stem: read_mask(path) for path in Path("any").iterdir()}
    capfd.readouterr()
    ends(0, *RELABEL)
    told = capfd.readouterr()
    assert f"{COUNT} made, 0 there before, 0 failed" in told.err
    assert told.out.strip() == str(Path("run") / "relabelled")
    assert before.items() <= contents(run.root).items()
    files = run.relabelled
    assert files.ids("pseudo") == files.ids("confidence") == run.ids("pseudo")
    found_at_all, left_out = set(), 0
    for sample in reopen(run, None).samples:
        pseudo = files.load_pseudo(sample.id)
        allowed = {0, *(label + 1 for label in sample.labels)}
        found = set(np.unique(pseudo.mask).tolist())
        assert found <= allowed
        left_out += not set(np.unique(said[sample.id]).tolist()) <= allowed
        assert 1 / (1 + len(sample.labels)) <= pseudo.confidence.min() + 1e-4
        found_at_all |= found
    assert found_at_all == {0, 1, 2, 3}
    assert left_out == COUNT
    settings = json.loads(run.manifest_path.read_text())["stages"]["relabel"]["settings"]
    assert settings["crf"]["iterations"] == 10
    assert settings["crf"]["bilateral_compat"] == 3, "three quarters of what maps get"

    # Done is done; without the CRF they are other masks.
    ends(0, *RELABEL)
    assert f"0 made, {COUNT} there before" in capfd.readouterr().err
    smooth = contents(files.root)
    ends(0, *RELABEL, "--no-crf")
    told = capfd.readouterr()
    assert f"made again: {COUNT} masks, the first is p000: its mask was made with other" in told.err
    assert f"{COUNT} made" in told.err
    assert not contents(files.root).items() & smooth.items()


def test_only_what_changed_is_made_again(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    ends(0, *RELABEL)
    made, files = contents(run.relabelled.root), run.relabelled
    labels = Path("photos/labels.csv")
    labels.write_text(labels.read_text().replace("p001.jpg,dog", "p001.jpg,sofa"))
    files.pseudo_path("p002").unlink()
    shutil.copy("photos/images/p000.jpg", "photos/images/p003.jpg")
    capfd.readouterr()
    ends(0, *RELABEL)
    told = capfd.readouterr().err
    assert "made again: 2 masks, the first is p001: its mask was made for other labels" in told
    assert "3 made, 2 there before, 0 failed" in told
    now = contents(files.root)
    changed = {Path(name).stem for name in now if now[name] != made[name]}
    assert changed == {"p001", "p003"}
    assert set(np.unique(read_mask(files.pseudo_path("p001"))).tolist()) <= {0, 3}

    ends(0, *RELABEL, "--from", "b.pt")
    told = capfd.readouterr().err
    assert f"made again: {COUNT} masks, the first is p000: its mask was made by another" in told
    assert not {*contents(files.root).values()} & {*now.values()}


def test_what_a_person_edited_is_not_written_over(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(0, *RELABEL)
    path = run.relabelled.pseudo_path("p001")
    edited = np.full((48, 64), 2, np.uint8)
    write_mask(path, edited)
    capfd.readouterr()
    ends(0, *RELABEL)  # what it was made from is still there
    assert f"0 made, {COUNT} there before" in capfd.readouterr().err
    ends(1, *RELABEL, "--from", "b.pt")
    told = " ".join(capfd.readouterr().err.split())
    assert "skipping p001: its mask was made by another segmenter, and was edited since" in told
    assert "delete it to have it made again" in told
    assert f"made again: {COUNT - 1} masks" in told
    assert (read_mask(path) == edited).all()


def test_shards_make_the_same(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    with run.claim("relabel"):
        ends(1, *RELABEL)
    assert "another 'clipes relabel' is working in run/relabelled/pseudo" in capfd.readouterr().err
    ends(0, *RELABEL)
    whole = contents(run.relabelled.root)
    shutil.rmtree(run.relabelled.root)
    for shard in ("0/2", "1/2"):
        ends(0, *RELABEL, "--shard", shard)
    assert contents(run.relabelled.root) == whole


def test_masks_count_until_others_are_certain_to_come(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(0, *RELABEL)
    before = run.manifest_path.read_bytes()
    with run.claim("relabel"):
        ends(1, *RELABEL, "--share", 1)
    assert run.manifest_path.read_bytes() == before
    ends(1, *RELABEL, "--from", "b.pt", "--dino", "gone.safetensors")
    assert "gone.safetensors" in capfd.readouterr().err
    assert run.manifest_path.read_bytes() == before
    ends(0, *RELABEL, "--workers", 2)
    assert f"0 made, {COUNT} there before" in capfd.readouterr().err


def test_later_stages_choose_them(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    learn = [*FROZEN, "--iterations", 1, "--relabelled", "--out", "second", "--cgl"]
    ends(1, *learn)
    assert "run 'clipes relabel --from CHECKPOINT' first" in capfd.readouterr().err
    ends(0, *RELABEL)
    origin = RelabelOrigin.parse(read_origin(run.relabelled.pseudo_path("p000")))
    assert origin is not None
    assert origin.labels == (0,)
    files = run.relabelled
    for id_ in files.ids("pseudo"):  # sure enough to learn from
        text = read_origin(files.pseudo_path(id_))
        sure = np.ones((48, 64), np.float32)
        write_confidence(files.confidence_path(id_), sure, origin=text)
    labels = Path("photos/labels.csv")
    labels.write_text(labels.read_text().replace("p001.jpg,dog", "p001.jpg,sofa"))
    capfd.readouterr()
    ends(0, *learn)
    told = " ".join(capfd.readouterr().err.split())
    assert "left out: 1 images, the first is p001: its mask was made for other labels; run" in told
    settings = Run(Path("second")).stage("train-seg")["settings"]
    assert settings["masks"] == "relabelled"
    assert settings["examples"] == COUNT - 1

    ends(0, "eval", "run", "--json", "scores.json")
    told = " ".join(capfd.readouterr().err.split())
    assert "relabelled: out of date: 1 of 5 images, the first is p001: its mask was made" in told
    stages = json.loads(Path("scores.json").read_text())["stages"]
    assert list(stages) == [
        "CRF",
        "CRF >= 0.95",
        "relabelled",
        "relabelled >= 0.95",
        "segmenter, train",
    ]
    assert stages["CRF"]["miou"] == 1
    assert 0 < stages["relabelled"]["miou"] < 1

    ends(2, *learn, "--masks", "photos/masks")
    assert "two sets of masks, --relabelled and photos/masks; give one" in capfd.readouterr().err


def test_checkpoints_that_do_not_fit_are_told_in_a_line(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(1, *RELABEL, "--from", "gone.pt")
    assert "clipes: there is no checkpoint gone.pt; run 'clipes train-seg' first" in _one(capfd)
    Path("broken.pt").write_bytes(Path("a.pt").read_bytes()[:900])
    ends(1, *RELABEL, "--from", "broken.pt")
    assert "clipes: cannot read broken.pt" in _one(capfd)

    write_dino(Path("tower.safetensors"), seed=1)
    ends(1, *RELABEL, "--dino", "tower.safetensors")
    told = " ".join(capfd.readouterr().err.split())
    assert "the segmenter was trained on a tower dino of sha256" in told
    assert not run.relabelled.ids("pseudo")

    manifest = json.loads(run.manifest_path.read_text())
    assert manifest["stages"]["cam"]["settings"]["classes"] == list(CLASSES)
    manifest["stages"]["cam"]["settings"]["classes"] = ["cat", "sofa", "dog"]
    run.manifest_path.write_text(json.dumps(manifest))
    Path("photos/classes.txt").write_text("cat\nsofa\ndog\n")
    ends(1, *RELABEL)
    told = _one(capfd)
    assert "clipes: a.pt has other classes than run: its class 1 is dog, not sofa; take a" in told

    manifest["stages"]["cam"]["settings"]["classes"] = [*CLASSES, "none"]
    run.manifest_path.write_text(json.dumps(manifest))
    Path("photos/classes.txt").write_text("\n".join([*CLASSES, "none"]) + "\n")
    ends(1, *RELABEL)
    assert "its class 3 is none of any name, not none; take a" in _one(capfd)


def _one(capfd: pytest.CaptureFixture[str]) -> str:
    """Return what was said, which is a line."""
    told = capfd.readouterr().err.strip()
    assert "\n" not in told
    return told


def test_a_segmenter_from_python_says_what_predict_does(run: Run) -> None:
    ends(0, "predict", "a.pt", "photos/images", "--out", "any", *TOWERS)
    segmenter = clipes.load_segmenter("a.pt", dino="dino.safetensors", weights="clip.safetensors")
    pseudo = segmenter.segment("photos/images/p000.jpg")
    assert segmenter.classes == CLASSES
    assert (pseudo.mask == read_mask("any/p000.png")).all()
    assert pseudo.confidence.shape == pseudo.mask.shape
    assert 0.25 <= pseudo.confidence.min() <= pseudo.confidence.max() <= 1

    ends(0, *RELABEL)
    known = segmenter.segment("photos/images/p002.jpg", ["sofa", "dog"])
    assert (known.mask == run.relabelled.load_pseudo("p002").mask).all()
    with pytest.raises(clipes.ClipesError, match="no labels"):
        segmenter.segment("photos/images/p002.jpg", [])
    with pytest.raises(clipes.ClipesError, match="there is no checkpoint"):
        clipes.load_segmenter("gone.pt")


def test_the_review_queue_asks_the_segmenter_while_its_masks_are_current(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    def queue() -> dict[str, float]:
        ends(0, "report", "run", "--pictures", 0, "--thumbnails", 0)
        rows = csv.DictReader((run.root / "report" / "review.csv").read_text().splitlines())
        return {row["image"]: float(row["score"]) for row in rows}

    give_maps(run)
    alone = queue()
    ends(0, *RELABEL)
    both = queue()
    assert both.keys() == alone.keys()
    assert all(both[id_] > alone[id_] for id_ in both)
    capfd.readouterr()
    path = run.relabelled.pseudo_path("p001")
    path.write_bytes(path.read_bytes()[:60])
    (run.relabelled.pseudo_path("p002")).unlink()
    some = queue()
    assert (
        "2 of the images have no mask that the segmenter would make now" in capfd.readouterr().err
    )
    assert some == both | {id_: alone[id_] for id_ in ("p001", "p002")}


def test_the_maps_of_the_run_have_their_share(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    ends(0, *RELABEL)
    told = " ".join(capfd.readouterr().err.split())
    assert f"{COUNT} images have no maps: the segmenter alone says what they show" in told
    files, alone = run.relabelled, contents(run.relabelled.root)
    give_maps(run, "a line of an older clipes")
    ends(0, *RELABEL, "--share", 1)
    assert f"{COUNT} made, 0 there before" in capfd.readouterr().err, "another setting"
    share_one = [read_mask(files.pseudo_path(id_)) for id_ in run.ids("cams")]
    ends(0, *RELABEL, "--share", 0.01, "--no-crf")
    assert "no maps" not in capfd.readouterr().err
    for sample in reopen(run, None).samples:
        mask = read_mask(files.pseudo_path(sample.id))
        assert (mask[:, :24] > 0).all(), "where the maps have it"
        assert (mask[:, 40:] == 0).all()
    ends(0, *RELABEL)
    both = [read_mask(files.pseudo_path(id_)) for id_ in run.ids("cams")]
    assert any((one != other).any() for one, other in zip(both, share_one, strict=True))
    assert contents(files.root) != alone
    assert run.stage("relabel")["settings"]["share"] == 0.5
    shutil.move(run.root / "cams", "elsewhere")  # they take room, and were used
    capfd.readouterr()
    ends(0, *RELABEL)
    assert f"0 made, {COUNT} there before" in capfd.readouterr().err
    shutil.move("elsewhere", run.root / "cams")

    capfd.readouterr()
    cams = run.load_cams("p001")
    run.save_cams("p001", cams, origin="made from something else")
    ends(0, "eval", "run")
    told = " ".join(capfd.readouterr().err.split())
    assert "relabelled: out of date: 1 of 5 images, the first is p001: its mask was made wi" in told
    run.save_cams("p001", CamMaps(np.array([0]), cams.maps[:1], (48, 64)))  # of other labels
    ends(1, *RELABEL, "--scales", "1,1.5")
    told = " ".join(capfd.readouterr().err.split())
    assert "skipping p001: its maps were made for" in told
    assert f"{COUNT - 1} made" in told
    ends(2, *RELABEL, "--share", 1.5)
    ends(2, *RELABEL, "--share", 0)
    assert "is not above 0 and at most 1" in capfd.readouterr().err
