"""Fewer actions that fail alike."""

import re


def kind(failure):
    """What two failures have in common: their words without numbers and names."""
    return re.sub(r"[\d'\"]+|\b[nielj]+\d+\b", "", failure or "").split(":", 2)[1][:30] if failure and ":" in failure else failure


def shorter(trace, failure, attempt, tries=200):
    """The shortest list found, and how it fails. `attempt` gives the failure of a list, or None; it may fail by chance, so it is asked twice."""
    piece = max(1, len(trace) // 2)
    while piece and tries > 0:
        at = 0
        while at < len(trace) and tries > 0:
            fewer = trace[:at] + trace[at + piece :]
            tries -= 1
            again = attempt(fewer) or attempt(fewer)
            if again is not None and kind(again) == kind(failure):
                trace, failure = fewer, again
            else:
                at += piece
        piece //= 2
    return trace, failure
