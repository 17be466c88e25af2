"""Files: complete or absent, claimed, and not trusted."""
