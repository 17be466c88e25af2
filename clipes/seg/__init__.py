"""The segmenter that is trained on the pseudo-masks (paper section 3.4; docs/method.md, 6)."""
