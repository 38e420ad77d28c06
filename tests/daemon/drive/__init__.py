"""What the scenarios drive a storage daemon with. A scenario imports `scenario` and `check` and gets a `Case`."""

from drive.case import Case, Failed, check, scenario

__all__ = ["Case", "Failed", "check", "scenario"]
