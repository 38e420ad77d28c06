"""What a daemon said, in order and without what differs from run to run."""

import re

# Values that depend on the machine, the build or the moment, by the name of their field.
MASKED = {"actual-size": "<size>", "pid": "<pid>", "qemu-version": "<version>", "package": "<package>"}

# Digits of names that the daemon makes up.
MADE_UP = re.compile(r"#block\d+")


class Transcript:
    """Streams of entries. What one monitor says is one stream, because only within it is there an order."""

    def __init__(self):
        self.streams = {}
        self._replace = []
        self._mask = dict(MASKED)

    def hide(self, text, name):
        """Writes `name` wherever `text` occurs (a folder, a port)."""
        self._replace.append((str(text), name))
        self._replace.sort(key=lambda pair: -len(pair[0]))

    def mask(self, *fields):
        """Leaves out the values of fields that depend on timing in this scenario."""
        self._mask.update({field: "<timing>" for field in fields})

    def add(self, stream, label, value):
        """One more entry. `label` says what it is: the same thing on both sides has the same label."""
        self.streams.setdefault(stream, []).append((label, value))

    def clean(self):
        """The streams as they are compared."""
        kept = {name: without_drains(entries) for name, entries in self.streams.items()}
        return {name: [(self._text(label), self._clean(value)) for label, value in entries] for name, entries in kept.items()}

    def _text(self, text):
        for old, new in self._replace:
            text = text.replace(old, new)
        return MADE_UP.sub("#block", text)

    def _clean(self, value):
        if isinstance(value, dict):
            return {self._text(key): self._mask.get(key) or self._clean(inner) for key, inner in without_length(value).items()}
        if isinstance(value, (list, tuple)):
            return [self._clean(inner) for inner in value]
        return self._text(value) if isinstance(value, str) else value


# What a drain looks like from outside: a state of a job, and the one that it goes through for the moment.
DRAINED = {"paused": "running", "standby": "ready"}


def without_drains(entries):
    """Entries without the pairs `paused`, `running` of one job that no command stands between.

    A job says so each time the graph is drained; how often that is needed is the daemon's own affair.
    """
    dropped = set()
    for at, (label, value) in enumerate(entries):
        if label != "event JOB_STATUS_CHANGE" or value["data"]["status"] not in DRAINED:
            continue
        for later in range(at + 1, len(entries)):
            name, follower = entries[later]
            if not name.startswith("event"):
                break
            if owner(follower) == owner(value):
                if follower["data"].get("status") == DRAINED[value["data"]["status"]]:
                    dropped |= {at, later}
                break
    return [entry for at, entry in enumerate(entries) if at not in dropped]


def without_length(value):
    """An image's information without the length of a file that holds a format: that is the allocator's affair."""
    if value.get("format") in ("file", "host_device", "blkdebug") and value.get("virtual-size", 0) % (1 << 20):
        return {**value, "virtual-size": "<length>"}
    return value


def by_job(entries):
    """Entries with the events of different jobs apart: for scenarios in which jobs run at the same time.

    Replies stay in their places at the front; the events of each job follow, in their own order.
    """
    replies = [entry for entry in entries if not entry[0].startswith("event")]
    events = [entry for entry in entries if entry[0].startswith("event")]
    return replies + sorted(events, key=lambda entry: str(owner(entry[1])))


def owner(event):
    """The job, export or node that an event is about."""
    data = event.get("data", {}) if isinstance(event, dict) else {}
    return data.get("id") or data.get("device") or data.get("node-name") or ""
