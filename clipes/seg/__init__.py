"""The segmenter that is trained on the pseudo-masks (paper section 3.4; METHOD section 5)."""
