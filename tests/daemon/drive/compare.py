"""Two transcripts side by side, and the list of differences that are meant to be."""

import difflib
import fnmatch
import json
import tomllib
from dataclasses import dataclass

from drive.transcript import by_job

ABSENT = "(nothing)"


@dataclass(frozen=True)
class Difference:
    """One place where two transcripts disagree. `place` is `stream/label/field.field`, as differences.toml names it."""

    scenario: str
    place: str
    reference: str
    headwater: str

    def __str__(self):
        return f"    {self.place}\n      reference: {self.reference}\n      headwater: {self.headwater}"


def shown(value):
    """A value in one line."""
    return value if isinstance(value, str) and value == ABSENT else json.dumps(value)


def fields(reference, headwater, path=""):
    """The places below `path` where two values differ."""
    if isinstance(reference, dict) and isinstance(headwater, dict):
        for key in list(reference) + [key for key in headwater if key not in reference]:
            yield from fields(reference.get(key, ABSENT), headwater.get(key, ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(reference, list) and isinstance(headwater, list) and len(reference) == len(headwater):
        for index, pair in enumerate(zip(reference, headwater)):
            yield from fields(*pair, f"{path}[{index}]")
    elif reference != headwater or type(reference) is not type(headwater):
        yield path, shown(reference), shown(headwater)


def key(entry):
    """By what entries are aligned: events also by what they are about and the state they tell."""
    label, value = entry
    data = value.get("data", {}) if isinstance(value, dict) and label.startswith("event") else {}
    return (label, data.get("id") or data.get("device") or data.get("node-name"), data.get("status"))


def title(entry):
    """An entry's label with what tells it from others of its kind."""
    return " ".join(str(part) for part in key(entry) if part)


def compare(scenario, reference, headwater, parallel=False):
    """The differences between two transcripts (of `Transcript.clean`)."""
    found = []
    for stream in list(reference) + [name for name in headwater if name not in reference]:
        sides = [side.get(stream, []) for side in (reference, headwater)]
        if parallel:
            sides = [by_job(side) for side in sides]
        matcher = difflib.SequenceMatcher(None, [key(e) for e in sides[0]], [key(e) for e in sides[1]], autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag == "equal":
                for left, right in zip(sides[0][a:b], sides[1][c:d]):
                    found += [Difference(scenario, f"{stream}/{title(left)}/{place}", *pair) for place, *pair in fields(left[1], right[1])]
                continue
            found += [Difference(scenario, f"{stream}/{title(entry)}", shown(entry[1]), ABSENT) for entry in sides[0][a:b]]
            found += [Difference(scenario, f"{stream}/{title(entry)}", ABSENT, shown(entry[1])) for entry in sides[1][c:d]]
    return found


@dataclass
class Intended:
    """An entry of differences.toml."""

    scenario: str
    at: str
    reason: str
    reference: str = "*"
    headwater: str = "*"
    timing: bool = False
    used: int = 0

    def covers(self, difference):
        """Whether this entry is about that difference."""
        pairs = ((difference.place, self.at), (difference.reference, self.reference), (difference.headwater, self.headwater))
        hit = fnmatch.fnmatchcase(difference.scenario, self.scenario) and all(glob(text, pattern) for text, pattern in pairs)
        self.used += hit
        return hit


def glob(text, pattern):
    """fnmatch in which only `*` is special: places have brackets of their own."""
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))


def load(path):
    """The intended differences in a file."""
    with open(path, "rb") as file:
        return [Intended(**entry) for entry in tomllib.load(file).get("difference", [])]
