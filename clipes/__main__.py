"""``python -m clipes`` is the command line."""

from __future__ import annotations

from clipes.cli import main

main()
