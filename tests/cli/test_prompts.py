"""clipes prompts as a user runs it, and what cam does with its results."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipes.config import WeClipPreset
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.stages.cam import ClipRequest
from clipes.stages.setup import load_clip
from clipes.stages.teacher import open_teacher
from clipes.stages.token_source import TowerRequest
from clipes.words.encode import fingerprint
from clipes.words.vocabulary import load_vocabulary
from tests.cli.conftest import Cli
from tests.cli.inline import failed
from tests.cli.small_data import write_clip

# Most of what follows goes through ``main`` in this process: a new one has to import torch again.
TEMPLATES = "# mine\na photo of a {}.\nthe plastic {}.\nitap of my {}.\n"


def folder(photos: Path, weights: Path) -> tuple[object, ...]:
    return ("--dataset", "folder", "--root", photos, "--weights", weights)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        'template = "a {}."\nclasses = ["cat", "cow", "dog", "person", "sofa"]\n'
        'background = ["sky", "grass"]\n[synonyms]\nperson = ["people", "human"]\n'
    )
    return path


def test_show_prints_what_each_class_becomes(inline: Cli, vocabulary: Path) -> None:
    shown = inline("prompts", "show", vocabulary)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[3] == "person\ta people,human."
    assert lines[-1] == "(grass)\ta grass."
    assert len(lines) == 7
    each = inline("prompts", "show", vocabulary, "--fusion", "cam", "--template", "the {}")
    assert each.stdout.splitlines()[3] == "person\tthe people\tthe human"
    assert "one map per prompt" in each.stderr
    assert "aeroplane" in inline("prompts", "show").stdout
    assert "hairdrier,blowdrier" in inline("prompts", "show", "coco").stdout
    assert "best" in failed(inline("prompts", "show", "--template", "best"), 2)
    assert "clases" in failed(_with(inline, vocabulary, "clases = []\n"))


def _with(inline: Cli, vocabulary: Path, line: str) -> subprocess.CompletedProcess[str]:
    vocabulary.write_text(line + vocabulary.read_text())
    return inline("prompts", "show", vocabulary)


def test_the_best_template_of_a_ranking_makes_maps(
    cli: Cli, inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    options = folder(photos, tiny_weights)
    assert "clipes prompts rank" in failed(inline("cam", *options, "--template", "best"))
    (tmp_path / "mine.txt").write_text(TEMPLATES)
    ranked = cli("prompts", "rank", *options, "--templates", "mine.txt")
    assert ranked.returncode == 0, ranked.stderr
    assert "6 images, 2 of them with several classes" in ranked.stderr
    table = [line.split("\t") for line in ranked.stdout.splitlines()]
    assert [row[0] for row in table] == ["1", "2", "3"]
    assert [float(row[1]) for row in table] == sorted(float(row[1]) for row in table)
    stored = json.loads((tmp_path / "runs" / "folder" / "prompts.json").read_text())
    assert [name for name, _ in stored["ranking"]] == [row[2] for row in table]
    again = inline("prompts", "rank", *options, "--templates", "mine.txt")
    assert again.stdout == ranked.stdout

    best = cli("cam", *options, "--template", "best")
    assert best.returncode == 0, best.stderr
    text = Run(tmp_path / "runs" / "folder").stage("cam")["settings"]["text"]
    assert text["templates"] == [table[0][2]]
    assert text["fusion"] == "sentence"
    same = inline("cam", *options, "--template", table[0][2])
    assert "0 made, 6 there before" in same.stderr
    assert "text.fusion" in failed(
        inline("cam", *options, "--template", "best", "--fusion", "feature")
    )
    other = inline("cam", *options, "--template", table[1][2])
    assert "text.templates" in failed(other)

    (photos / "classes.txt").write_text("cat\ncow\ndog\nperson\nsofa\nsheep\n")
    assert "other classes" in failed(
        inline("cam", *options, "--template", "best", "--out", "elsewhere")
    )


def test_fusion_changes_the_maps_of_classes_with_synonyms_and_no_others(
    inline: Cli, photos: Path, tiny_weights: Path, vocabulary: Path, tmp_path: Path
) -> None:
    # Preset default compares with other images, too, which may show such classes.
    options = (*folder(photos, tiny_weights), "--prompts", vocabulary, "--preset", "fast")
    runs = {}
    for level in ("sentence", "feature", "cam", "cam-max"):
        done = inline("cam", *options, "--out", level, "--fusion", level)
        assert done.returncode == 0, done.stderr
        runs[level] = Run(tmp_path / level)
        assert runs[level].stage("cam")["settings"]["text"]["fusion"] == level
    cats = [run.load_cams("p2").maps for run in runs.values()]
    people = [run.load_cams("p3").maps for run in runs.values()]
    for index in range(1, 4):
        np.testing.assert_array_equal(cats[index], cats[0])
        assert all(np.abs(people[index] - people[k]).max() > 1e-3 for k in range(index))


def test_descriptions_change_the_maps_of_classes_that_have_some(
    inline: Cli, photos: Path, tiny_weights: Path, vocabulary: Path, tmp_path: Path
) -> None:
    options = (*folder(photos, tiny_weights), "--prompts", vocabulary, "--preset", "fast")
    asked = inline("cam", *options, "--out", "none", "--descriptions", "max")
    assert "[descriptions]" in failed(asked)
    assert inline("cam", *options, "--out", "none").returncode == 0
    plain = vocabulary.read_text()
    vocabulary.write_text(f'{plain}[descriptions]\nperson = ["a face", "two hands"]\n')
    again = inline("cam", *options, "--out", "none")
    assert "0 made, 6 there before" in again.stderr  # nobody asked for them
    shown = inline("prompts", "show", vocabulary)
    assert shown.stdout.splitlines()[3] == "person\ta people,human."
    assert "descriptions of 1 of 5 classes, not used: --descriptions" in shown.stderr
    shown = inline("prompts", "show", vocabulary, "--descriptions", "average")
    assert shown.stdout.splitlines()[3] == "person\ta people,human.\ta face\ttwo hands"
    assert "are averaged" in shown.stderr

    runs = {None: Run(tmp_path / "none")}
    for how in ("average", "max"):
        mine = (*options, "--out", how, "--descriptions", how)
        done = inline("cam", *mine)
        assert done.returncode == 0, done.stderr
        assert "encoding 2 descriptions" in done.stderr or how == "max"  # known by then
        runs[how] = Run(tmp_path / how)
        assert "0 made, 6 there before" in inline("cam", *mine).stderr
    told = {how: run.stage("cam")["settings"]["text"]["descriptions"] for how, run in runs.items()}
    assert told == {how: how for how in (None, "average", "max")}
    cats = [run.load_cams("p2").maps for run in runs.values()]
    people = [run.load_cams("p3").maps for run in runs.values()]
    for index in range(1, 3):
        np.testing.assert_array_equal(cats[index], cats[0])
        assert all(np.abs(people[index] - people[k]).max() > 1e-3 for k in range(index))

    conflict = inline("cam", *options, "--out", "max", "--descriptions", "average")
    assert 'text.descriptions = "max", not "average"' in failed(conflict)
    vocabulary.write_text(f'{plain}[descriptions]\nperson = ["a face", "two feet"]\n')
    assert "text.sha256" in failed(inline("cam", *mine))
    beside = inline("cam", *options, "--out", "x", "--descriptions", "max", "--fusion", "cam")
    assert "--fusion cam" in failed(beside, 2)


def test_shipped_descriptions_of_a_run_are_known_to_its_segmenters(
    inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    options = (*folder(photos, tiny_weights), "--preset", "reference", "--descriptions", "max")
    done = inline("cam", *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    preset, towers = WeClipPreset("weclip-voc"), TowerRequest(str(tiny_weights), "auto")
    teacher = open_teacher(run, preset, towers, "cpu", Listener())  # else it would be refused
    assert teacher.vectors.of([0, 1]).shape == (2, 6, 64)
    shown = inline("prompts", "check", "--weights", tiny_weights, "--descriptions", "max")
    assert shown.returncode == 0, shown.stderr
    written = json.loads((run.root / "run.json").read_text())
    written["stages"]["cam"]["settings"]["text"]["descriptions"] = "most"
    (run.root / "run.json").write_text(json.dumps(written))
    assert "most" in failed(inline("refine", run.root))


def test_further_background_words_of_a_run_are_known_to_its_segmenters(
    inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    rows = [f"p{number}.jpg,cat" for number in range(6)]
    (photos / "labels.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
    options = (*folder(photos, tiny_weights), "--preset", "fast")
    done = inline("cam", *options, "--prompts", "coco", "--out", "run")
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    written = json.loads((run.root / "run.json").read_text())
    settings = written["stages"]["cam"]["settings"]
    settings["dataset"] = "coco"  # whose words are found again by its name
    preset, towers = WeClipPreset("weclip-voc"), TowerRequest(str(tiny_weights), "auto")
    words, asked = load_vocabulary("coco"), ClipRequest(str(tiny_weights))
    # Also those of an older clipes, which knew none.
    for wide in (True, False):
        text = load_clip(asked, words, Listener(), wide=wide).text
        assert (settings["text"]["sha256"] == fingerprint(text)) == wide
        settings["text"]["sha256"] = fingerprint(text)
        (run.root / "run.json").write_text(json.dumps(written))
        teacher = open_teacher(run, preset, towers, "cpu", Listener())  # else it would be refused
        assert len(teacher.vectors.background) == 23 + 26 * wide


def test_a_bad_image_is_named_and_the_others_are_ranked(
    inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    (photos / "images" / "p0.jpg").write_bytes(b"no picture")
    (tmp_path / "mine.txt").write_text(TEMPLATES)
    ranked = inline("prompts", "rank", *folder(photos, tiny_weights), "--templates", "mine.txt")
    assert ranked.returncode == 1
    assert "skipping p0: " in ranked.stderr
    assert len(ranked.stdout.splitlines()) == 3
    assert "5 images" in ranked.stderr


def test_without_a_text_tower_files_of_features_are_ranked(
    inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    state = torch.load(tiny_weights, weights_only=True)
    image_only = {key: value for key, value in state.items() if key.startswith(("vis", "logit"))}
    torch.save(image_only, tmp_path / "image.pt")
    options = folder(photos, tmp_path / "image.pt")
    told = failed(inline("prompts", "rank", *options))
    assert "needs a text tower" in told
    assert "--weights openai" in told

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(
            tmp_path / f"{name}.npz",
            names=np.array(["cat", "cow", "dog", "person", "sofa", "sky"]),
            features=rng.standard_normal((6, 64)),
            background=np.arange(6) == 5,
            model=np.array("tiny"),
        )
    files = ("--text-features", "a.npz", "--text-features", "b.npz")
    ranked = inline("prompts", "rank", *options, *files, "--limit", 5)
    assert ranked.returncode == 0, ranked.stderr
    assert sorted(line.split("\t")[2] for line in ranked.stdout.splitlines()) == ["a.npz", "b.npz"]
    assert "5 images" in ranked.stderr
    told = failed(inline("cam", *options, "--text-features", "a.npz", "--template", "a {}"))
    assert "come from a file" in told
    both = inline("prompts", "rank", *options, *files, "--templates", "x.txt")
    assert "exclude each other" in failed(both, 2)


def test_check_does_not_stop_for_classes_that_cam_would_fit(
    inline: Cli, vocabulary: Path, tmp_path: Path
) -> None:
    write_clip(tmp_path / "clip.safetensors", tmp_path / "text.npz")
    tower = load_file(tmp_path / "clip.safetensors")
    tower["visual.proj"] = torch.ones(64, 512)  # the width of the vectors that are shipped
    save_file(tower, tmp_path / "clip.safetensors")
    vocabulary.write_text('classes = ["cat", "rocket"]\nbackground = ["sky"]\n')
    told = inline("prompts", "check", vocabulary, "--weights", tmp_path / "clip.safetensors")
    assert told.returncode == 0, told.stderr
    line = " ".join(told.stderr.split())
    assert "vectors were not compared: no text feature for the class 'rocket' among" in line
    assert "'clipes cam' fits them to the images and labels of a run" in line
    assert "that takes --weights" not in line
    assert told.stdout.splitlines() == ["cat\t7", "rocket\t7", "(sky)\t7"]


def test_check_warns_and_stops_only_for_what_stops_cam(
    inline: Cli, vocabulary: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    before = vocabulary.read_text()
    fine = inline("prompts", "check", vocabulary)
    assert fine.returncode == 0, fine.stderr
    assert "0 warnings, 0 errors" in fine.stderr
    assert fine.stdout.splitlines()[0] == "cat\t5"

    collides = before.replace('"sky"', '"humans"')
    vocabulary.write_text(collides)
    warned = inline("prompts", "check", vocabulary, "--weights", tiny_weights)
    assert warned.returncode == 0, warned.stderr
    assert "warning: background word 'humans' is also the class 'person'" in warned.stderr
    assert vocabulary.read_text() == collides
    name, tokens, nearest, cosine = warned.stdout.splitlines()[0].split("\t")
    assert (name, tokens) == ("cat", "5")
    assert nearest in {"cow", "dog", "person", "sofa", "humans", "grass"}
    assert -1 <= float(cosine) <= 1

    long = json.dumps([f"person number {k}" for k in range(40)])
    vocabulary.write_text(before.replace('["people", "human"]', long))
    stopped = inline("prompts", "check", vocabulary, "--weights", tiny_weights)
    assert stopped.returncode == 1
    assert "error: the prompt of 'person' has " in stopped.stderr
    assert inline("prompts", "check", vocabulary, "--fusion", "cam").returncode == 0

    vocabulary.write_text(re.sub(r"background = .*", "background = []", before))
    bare = inline("prompts", "check", vocabulary)  # vectors may come with words of their own
    assert bare.returncode == 0
    assert "warning: there are no words for the background" in bare.stderr
    without = inline("prompts", "check", vocabulary, "--weights", tiny_weights)
    assert without.returncode == 1
    assert "error: there are no words for the background" in without.stderr

    np.savez(
        tmp_path / "f.npz",
        names=np.array(["cat"]),
        features=np.ones((1, 4)),
        background=np.array([False]),
        model=np.array("x"),
    )
    vocabulary.write_text(before)
    missing = inline("prompts", "check", vocabulary, "--text-features", "f.npz")
    assert "no text feature for the classes 'cow', " in failed(missing)
    assert "nonsense" in failed(inline("prompts", "check", "nonsense"))
