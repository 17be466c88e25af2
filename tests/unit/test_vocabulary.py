"""Prompts files: what ships, what a user may write, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

from clipes.choices import Fusion
from clipes.errors import VocabularyError
from clipes.names import SAME_THING, nearest
from clipes.words import shipped
from clipes.words.vocabulary import (
    SHIPPED,
    Vocabulary,
    load_templates,
    load_vocabulary,
    parse_templates,
    parse_vocabulary,
    shipped_synonyms,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parents[2] / "clipes"
WORDS = st.text(
    st.characters(categories=("L", "N", "P", "S"), include_characters=" "), min_size=1, max_size=12
).filter(lambda word: word.strip() != "")


def _toml(value: str | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML has JSON's strings, but no surrogates


def test_further_background_words_are_not_for_the_published_method() -> None:
    words = parse_vocabulary(
        'classes = ["cat", "box"]\nbackground = ["sky"]\nmore_background = ["door", "sand"]'
    )
    assert words.background == ("sky",)
    assert words.prompts()[2:] == ("a clean origami sky.",)
    wide = words.widened()
    assert (wide.background, wide.more_background) == (("sky", "door", "sand"), ())
    assert wide.widened() == wide
    other = words.with_classes(("Door", "dog"))
    assert other.widened().background == ("sky", "sand")
    with pytest.raises(VocabularyError, match="the background word 'sky' appears twice"):
        parse_vocabulary('classes = ["cat"]\nbackground = ["sky"]\nmore_background = ["sky"]')


def test_voc_ships_as_in_the_paper() -> None:
    voc = load_vocabulary("voc")
    assert len(voc.classes) == 20
    assert len(voc.background) == 25
    prompts = voc.prompts()
    assert prompts[14] == "a clean origami person with clothes,people,human."
    assert prompts[-1] == "a clean origami sign."
    assert len(prompts) == 45


def test_coco_ships_in_the_order_of_its_masks(shared: Path) -> None:
    coco = load_vocabulary("coco")
    named = (shared / "data" / "coco_sample" / "classes.txt").read_text().split("\n")
    assert list(coco.classes) == [name for name in named if name]
    assert len(coco.background) == 23
    assert not {"keyboard", "sign"} & set(coco.background)
    prompts = coco.prompts()
    assert prompts[coco.classes.index("backpack")] == "a clean origami backpack,bag."
    assert prompts[coco.classes.index("tie")] == "a clean origami necktie."
    assert prompts[coco.classes.index("snowboard")] == "a clean origami snowboard."


def test_shipped_templates_are_clips_and_the_papers() -> None:
    templates = load_templates()
    assert list(templates[:80]) == [make("{}") for make in OPENAI_IMAGENET_TEMPLATES]
    assert templates[80:] == ("a clean origami {}.", "a rendering of a weird {}.")


@pytest.mark.parametrize("name", ["voc.toml", "coco.toml", "templates.txt"])
def test_shipped_files_say_where_they_come_from(name: str) -> None:
    first = (PACKAGE.parent / "prompts" / name).read_text("utf-8").split("\n\n")[0]
    comment = " ".join(line[1:] for line in first.splitlines() if line.startswith("#"))
    assert "arXiv:2212.09506" in comment


def test_phrases_at_every_level() -> None:
    words = Vocabulary(("cat", "person"), ("sky",), {"person": ("people", "human being")})
    assert words.phrases() == (("cat",), ("people,human being",), ("sky",))
    for fusion in (Fusion.feature, Fusion.cam, Fusion.cam_max):
        assert words.phrases(fusion) == (("cat",), ("people", "human being"), ("sky",))


def test_other_classes_keep_what_still_fits() -> None:
    words = Vocabulary(("cat", "dog"), ("sky", "cow"), {"dog": ("puppy",), "cat": ("kitten",)})
    other = words.with_classes(("cow", "dog"))
    assert other.classes == ("cow", "dog")
    assert other.background == ("sky",)
    assert other.synonyms == {"dog": ("puppy",)}


@given(
    classes=st.lists(WORDS, min_size=1, max_size=254, unique=True),
    background=st.lists(WORDS, max_size=5, unique=True),
    synonyms=st.lists(WORDS, min_size=1, max_size=3, unique=True),
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(
    classes: list[str], background: list[str], synonyms: list[str]
) -> None:
    name = classes[-1]
    text = "\n".join(
        [
            f"classes = {_toml(classes)}",
            f"background = {_toml(background)}",
            'template = "the {}"',
            "[synonyms]",
            f"{_toml(name)} = {_toml(synonyms)}",
        ]
    )
    words = parse_vocabulary(text)
    assert words == Vocabulary(tuple(classes), tuple(background), {name: tuple(synonyms)}, "the {}")
    assert words.prompts()[len(classes) - 1] == f"the {','.join(synonyms)}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "without classes"),
        ("classes = []", "without classes"),
        ('classes = ["cat", " "]', "an empty class"),
        ('classes = ["cat", "cat"]', "'cat' appears twice"),
        ('classes = ["cat", "do\\tg"]', "cannot be printed"),
        ('classes = "cat"', "not a list of strings"),
        ("classes = [1, 2]", "not a list of strings"),
        (f"classes = {json.dumps([f'c{k}' for k in range(255)])}", "255 classes"),
        ('classes = ["cat"]\nbackground = ["sky", "sky"]', "'sky' appears twice"),
        ('classes = ["cat"]\nbackground = [""]', "an empty background word"),
        ('classes = ["cat"]\nclases = ["dog"]', "unknown key 'clases'"),
        ('classes = ["cat"]\ntemplate = "a cat"', "one {}"),
        ('classes = ["cat"]\ntemplate = "{} and {}"', "one {}"),
        ('classes = ["cat"]\ntemplate = "{}\\nx"', "one {}"),
        ('classes = ["cat"]\ntemplate = 3', "'template' is not a string"),
        ('classes = ["cat"]\nsynonyms = ["a"]', "'synonyms' is not a table"),
        ('classes = ["cat"]\n[synonyms]\ndog = ["a"]', "'dog', which is not a class"),
        ('classes = ["cat"]\n[synonyms]\ncat = []', "no synonym for 'cat'"),
        ('classes = ["cat"]\n[synonyms]\ncat = ["a", "a"]', "'a' appears twice"),
        ('classes = ["cat"]\n[synonyms]\ncat = "a"', "'synonyms.cat' is not a list"),
        ("classes = [", "not TOML"),
        (f"x = {'9' * 5000}", "not TOML"),
        (f"x = {'[' * 5000}", "not TOML"),
    ],
)
def test_what_makes_no_vocabulary_is_said_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(VocabularyError, match=r"my\.toml") as caught:
        load_vocabulary(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet="classetb ackgroundmyi=[]{}\"',.#\n1", max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_vocabulary_or_a_vocabulary_error(text: str) -> None:
    for parse in (parse_vocabulary, parse_templates):
        with suppress(VocabularyError):
            assert parse(text)


@given(data=st.binary(max_size=80))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_file_is_a_vocabulary_or_a_vocabulary_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.toml"
    path.write_bytes(data)
    for load in (load_vocabulary, load_templates):
        with suppress(VocabularyError):
            assert load(path)


@pytest.mark.parametrize("source", ["no/such.toml", "a\0b", "x" * 5000])
def test_paths_that_are_no_file(source: str) -> None:
    with pytest.raises(VocabularyError, match="cannot read"):
        load_vocabulary(source)


def test_a_file_saved_by_a_windows_editor(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(b'\xef\xbb\xbfclasses = ["cat"]\r\nbackground = ["sky"]\r\n')
    assert load_vocabulary(path) == Vocabulary(("cat",), ("sky",))
    path.write_bytes(b"\xef\xbb\xbf# mine\r\na {}.\r\n\r\nthe {}.\r\n")
    assert load_templates(path) == ("a {}.", "the {}.")


@pytest.mark.parametrize(
    ("text", "told"),
    [("# only\n\n", "no template"), ("a cat\n", "one {}"), ("a {}\na {}\n", "appears twice")],
)
def test_templates_that_are_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(text)
    with pytest.raises(VocabularyError, match=r"t\.txt") as caught:
        load_templates(path)
    assert told in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(VocabularyError, match="larger than"):
        load_vocabulary(path)


def test_shipped_names_are_those_of_the_files() -> None:
    assert sorted(SHIPPED) == sorted(
        path.stem for path in (PACKAGE.parent / "prompts").glob("*.toml")
    )


def test_other_classes_keep_their_synonyms_and_stop_competing_in_any_spelling() -> None:
    voc = load_vocabulary("voc").with_classes(("Person", "SKY", "emu"))
    assert voc.synonyms == {"Person": ("person with clothes", "people", "human")}
    assert "sky" not in voc.background
    assert "grass" in voc.background


@pytest.mark.parametrize(
    ("name", "meant"),
    [("TVs", "tv"), ("settee", None), ("Couches", "couch"), ("human", "person"), ("dgo", "dog")],
)
def test_what_a_name_means_in_other_words(name: str, meant: str | None) -> None:
    same = (*SAME_THING, *shipped_synonyms())
    assert nearest(name, load_vocabulary("coco").classes, groups=same) == meant
    assert nearest(name, ()) is None


def test_the_words_data_are_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``make wheel`` runs the demo from a real wheel; here its layout is made by hand."""
    checkout = PACKAGE.parent / "prompts"
    assert shipped.shipped_path("voc.toml") == checkout / "voc.toml"
    installed = tmp_path / "site-packages" / "clipes"
    (installed / "prompts").mkdir(parents=True)
    shutil.copy(checkout / "voc.toml", installed / "prompts")
    monkeypatch.setattr(shipped, "_PACKAGE", installed)
    assert shipped.shipped_path("voc.toml") == installed / "prompts" / "voc.toml"
    with pytest.raises(VocabularyError, match=r"lacks coco\.toml.*install clipes again"):
        shipped.shipped_path("coco.toml")


def test_the_wheel_maps_the_words_data_into_the_package() -> None:
    settings_of_build = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))
    wheel = settings_of_build["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"prompts": "clipes/prompts"}
    assert {path.name for path in (PACKAGE.parent / "prompts").iterdir()} >= {
        "voc.toml",
        "coco.toml",
        "templates.txt",
        "standin-vit-b-16.npz",
    }
