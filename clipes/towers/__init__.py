"""Frozen towers, and what one pass over an image leaves behind."""
