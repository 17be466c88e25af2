"""Which templates a run uses: the vocabulary's, one that is given, a file's, or the best ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clipes.disk.files import write_json
from clipes.disk.records import read_record
from clipes.errors import ArtifactError, UsageError, VocabularyError
from clipes.listener import ignore
from clipes.words.vocabulary import Vocabulary, check_template, load_templates

RANKING = "prompts.json"
"""Name of the ranking in a run folder."""

BEST = "best"
"""What asks for the best template of a ranking."""


@dataclass(frozen=True)
class Ranking:
    """What was ranked by sharpness, and with what.

    Attributes:
        kind: ``templates``, or ``features`` where files of text features were compared.
        ranking: Pairs of a template or path and its sharpness, best first.
        images: How many images were scored.
        several: How many of them show two classes or more: only these tell candidates apart.
        words: What stood for each class in the template.
        weights: Name of the weights.
        sha256: Their digest.
        dataset: Kind of data set.
    """

    kind: str
    ranking: tuple[tuple[str, float], ...]
    images: int
    several: int
    words: tuple[str, ...]
    weights: str
    sha256: str
    dataset: str

    def save(self, folder: Path) -> Path:
        """Write the ranking into a run folder and return its path."""
        path = folder / RANKING
        write_json(path, asdict(self))
        return path


def load_ranking(path: Path) -> Ranking:
    """Read a ranking.

    Raises:
        ArtifactError: The file is missing or is not one of ours.
    """
    again = "make it again with 'clipes prompts rank'"
    return read_record(path, Ranking, "the ranking", again)


def words_of(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return what stands for each class in a template, synonyms fused to one sentence."""
    return tuple(phrase for (phrase,) in vocabulary.phrases()[: len(vocabulary.classes)])


def choose_templates(
    wanted: str | None,
    vocabulary: Vocabulary,
    sha256: str,
    folders: Sequence[Path],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Return the templates that ``--template`` asks for; none means the vocabulary's own.

    Args:
        wanted: A sentence with ``{}``, the path of a file of templates whose features are averaged,
            ``best``, or None.
        vocabulary: The words of the run.
        sha256: Digest of the weights of the run.
        folders: Run folders that may hold a ranking, the first that does counts.
        say: Told which template is the best.

    Raises:
        VocabularyError: It is none of these, or the ranking was made for another vocabulary or with
            other weights.
        ArtifactError: There is no ranking, or it cannot be read.
    """
    if wanted is None:
        return ()
    if wanted == BEST:
        return (_best(vocabulary, sha256, folders, say),)
    return (check_template(wanted),) if "{" in wanted else load_templates(Path(wanted))


def templates_of(wanted: str | None, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return what words are put into where there is no run that may know the best template.

    Args:
        wanted: As for ``choose_templates``, but not ``best``.
        vocabulary: Whose template it is if ``wanted`` is None.

    Raises:
        UsageError: It is ``best``.
        VocabularyError: It is no template or file of templates.
    """
    if wanted == BEST:
        raise UsageError("'best' is known to 'clipes cam' only", "give a sentence or a file")
    return choose_templates(wanted, vocabulary, "", (), ignore) or (vocabulary.template,)


def _best(
    vocabulary: Vocabulary, sha256: str, folders: Sequence[Path], say: Callable[[str], None]
) -> str:
    paths = list(dict.fromkeys(folder / RANKING for folder in folders))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ArtifactError(
            f"no ranking for the best template: looked for {', '.join(map(str, paths))}",
            "run 'clipes prompts rank' first, with the same --out if there is one",
        )
    ranking = load_ranking(path)
    again = "rank again with 'clipes prompts rank'"
    if ranking.kind != "templates" or not ranking.ranking:
        raise VocabularyError(f"{path} ranks no templates but {ranking.kind}", again)
    if ranking.sha256 != sha256:
        raise VocabularyError(f"{path} was made with the weights {ranking.weights}", again)
    if ranking.words != words_of(vocabulary):
        raise VocabularyError(f"{path} was made for other classes or synonyms", again)
    template, score = ranking.ranking[0]
    say(f"template: '{template}', the best of {len(ranking.ranking)} (sharpness {score:.4f})")
    return check_template(template)
