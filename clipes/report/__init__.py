"""One HTML page that shows what a run made, and which of its masks need a person.

``measure`` looks at every image once, ``review`` turns what it sees into a queue, ``charts`` and
``pictures`` draw, ``page`` writes. The page is a single file without a link to anything outside it,
so that it can be mailed and opened from disk.
"""
