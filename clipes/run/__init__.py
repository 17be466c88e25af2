"""The run folder: its files, its record, what they were made from, and the loop over images."""
