"""How long a test waits for something that may hang."""

PATIENCE = 600.0
"""Seconds after which a process or a thread counts as hung: far more than any needs on one core beside other work, so
that no test passes or fails by how fast something is."""
