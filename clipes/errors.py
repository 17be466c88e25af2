"""Every error a user can cause, as one tree.

ClipesError
├── UsageError          a request that makes no sense (exit code 2)
├── DatasetError        data set folder, split, label file, annotation
│   └── SplitError          there is no such list of images
├── ImageError          one image that cannot be read or used
├── VocabularyError     prompts file, class names, text features
│   └── UnknownClassError   classes that no vector knows
├── WeightsError        a tower's weights: absent, corrupt, of another layout
│   └── DownloadError       the network did not deliver them (clipes.weights)
├── ArtifactError       a file of a run folder that is missing or malformed
│   ├── RunConflictError    a run folder made with other settings
│   └── WriteError          a file that cannot be written: permissions, full disk
├── TrainingError       a training that cannot go on (clipes.seg.train)
├── RegressionError     a score below its baseline (clipes.stages.baseline)
└── BackendError        an optional library that is asked for but not usable

The command line prints ``str(error)`` on one line: what is wrong, where, and what to do.
"""

from __future__ import annotations


class ClipesError(Exception):
    """Base of all errors that are the input's fault rather than the program's.

    Args:
        what: What is wrong and where (a path, an id, a value), without a final full stop.
        remedy: What the user can do about it; empty when there is nothing to add.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.what}; {self.remedy}" if self.remedy else self.what
        line = " ".join(text.split())
        # Names and the words of libraries may hold what a terminal would obey.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class UsageError(ClipesError):
    """The request itself makes no sense: bad option value, bad combination."""


class DatasetError(ClipesError):
    """A data set folder, split file, label file or annotation cannot be used."""


class SplitError(DatasetError):
    """There is no such list of images."""


class ImageError(ClipesError):
    """One image cannot be read or used."""


class VocabularyError(ClipesError):
    """A prompts file, a class name or a text-features file cannot be used."""


class UnknownClassError(VocabularyError):
    """There are classes that no vector knows: images with their labels could teach some."""


class WeightsError(ClipesError):
    """A tower's weights are absent, corrupt or of a layout that is not supported."""


class ArtifactError(ClipesError):
    """A file of a run folder is missing or malformed."""


class RunConflictError(ArtifactError):
    """A run folder was made with settings other than the ones asked for."""


class WriteError(ArtifactError):
    """A file cannot be written: the fault of a disk, not of the image that was to be saved.

    Stages stop at it instead of going on to the next image.
    """


class BackendError(ClipesError):
    """An optional library was asked for but cannot be used here."""
