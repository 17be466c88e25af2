"""The words' data, which lie in ``prompts/`` at the top of the repository.

A wheel has them inside the package; an editable install finds them where they are.
"""

from __future__ import annotations

from pathlib import Path

from clipes.errors import VocabularyError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_path(name: str) -> Path:
    """Return the path of a file that ships: a vocabulary, templates, stand-in vectors.

    Raises:
        VocabularyError: The installation lacks it.
    """
    places = (_PACKAGE / "prompts" / name, _PACKAGE.parent / "prompts" / name)
    for place in places:
        if place.is_file():
            return place
    raise VocabularyError(
        f"the installation lacks {name}: looked for {' and '.join(map(str, places))}",
        "install clipes again",
    )
