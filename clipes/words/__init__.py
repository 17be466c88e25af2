"""How words become vectors (paper section 3.2): vocabulary, vectors, encoding, templates."""
