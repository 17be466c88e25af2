"""CLIP as this project uses it: the frozen image tower with its attention, and the text tower."""
