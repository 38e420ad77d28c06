"""Leaving out what this machine can't do."""


class Skipped(Exception):
    """A scenario that can't run here; says why."""
