"""Throws damaged and hostile files at every parser of foreign files: `python -m tests.fuzz --help`."""
