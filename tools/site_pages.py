"""Hook of mkdocs: the papers at the top of the repository are pages of the site, too.

GitHub wants README and its kin there; mkdocs reads one folder. Links between the two are rewritten.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAPERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the papers to the pages of ``docs/``."""
    top = Path(config.config_file_path).parent
    for name in PAPERS:
        text = (top / name).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links out of ``docs/`` at the pages that the papers have become."""
    return markdown.replace("](../", "](")
