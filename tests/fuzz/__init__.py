"""Throws damaged and hostile files at every parser of untrusted files: `python -m tests.fuzz --help`."""
