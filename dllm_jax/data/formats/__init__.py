"""Corpora as they are published: one reader a form, and what of a folder is read.

Each reader has the two functions of `base.Reader`: `spans` cuts a file into pieces
that can be read apart, `records` yields the records of one (of text, `read` its
documents).
`tokens` gives rows of what others tokenised, by memory map. `folder` says which
files of a folder are data. Which reader a file has is for `data.source` to say.
Libraries are imported where a file needs them: tokenising processes start fast.
"""
