"""Class vectors fitted on labelled photos, for weights without a text tower."""
