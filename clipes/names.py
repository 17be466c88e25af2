"""Names of classes as people write them: spellings of one name, and what was probably meant."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

SAME_THING = (
    ("aeroplane", "airplane"),
    ("motorbike", "motorcycle"),
    ("diningtable", "dining table"),
    ("sofa", "couch"),
    ("pottedplant", "potted plant"),
    ("tvmonitor", "tv"),
    ("person", "face", "body"),
)
"""Names that VOC, COCO and MSRC have for the same things, or for parts of them."""


_HYPHEN = re.compile(r"(?<=\S)[-\u2010\u2011](?=\S)")
"""Not a sign, as in -1."""


def folded(name: str) -> str:
    """Return what the spellings of one name have in common.

    Names that differ only in case, underscores, hyphens between words, runs of spaces, or in how
    accents are composed are one name: CLIP's tokenizer tells no case apart, and people write the
    others as it comes.

    >>> folded("Dining_Table"), folded(" dining  table"), folded("dining-table"), folded("-1")
    ('dining table', 'dining table', 'dining table', '-1')
    """
    plain = unicodedata.normalize("NFC", name.replace("_", " ").casefold())
    return " ".join(_HYPHEN.sub(" ", plain).split())


def nearest(
    name: str,
    known: Iterable[str],
    *,
    groups: Iterable[Sequence[str]] = SAME_THING,
    alike: float = 0.6,
) -> str | None:
    """Return the one of the ``known`` names that ``name`` seems to mean, None if none is near.

    It may be misspelt, be a plural, or be what another data set calls the same thing.

    Args:
        name: The name.
        known: What it may mean.
        groups: Names of the same things.
        alike: How alike letters must be, from 0 to 1: high where most other names are no mistakes.

    >>> nearest("Cats", ["car", "cat"]), nearest("TV", ["car", "tvmonitor"]), nearest("x", ["cat"])
    ('cat', 'tvmonitor', None)
    """
    meant = {folded(other): other for other in known}
    for group in groups:
        words = [folded(word) for word in group]
        found = next((meant[word] for word in words if word in meant), None)
        if found is not None:
            meant = dict.fromkeys(words, found) | meant
    wanted = folded(name[:60])
    forms = (wanted, wanted.removesuffix("s"), wanted.removesuffix("es"))
    same = [form for form in forms if form in meant]
    near = same or difflib.get_close_matches(wanted, meant, n=1, cutoff=alike)
    return meant[near[0]] if near else None
