"""What a disk may hold: for each unit of 512 bytes the writes that went there, with when they were asked for and when they were answered."""

import itertools
import math

UNIT = 512

# What a unit holds that was made zero.
ZERO = 0

# In place of a value: zero, or what was there before.
DISCARDED = -1

serials = itertools.count(1)


def pattern(serial, unit):
    """The bytes of a unit: they tell which write they came from, and where they belong."""
    if serial == ZERO:
        return bytes(UNIT)
    return (serial.to_bytes(4, "little") + unit.to_bytes(4, "little")) * (UNIT // 8)


def found(data):
    """The other way round, for messages: which write a unit's bytes come from."""
    if data == bytes(UNIT):
        return "zeroes"
    serial, unit = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
    whole = "" if data == pattern(serial, unit) else " (mixed with other bytes)"
    return f"write {serial} to unit {unit}{whole}"


class Disk:
    """The history of a disk. A unit whose content isn't known may hold anything (`None` among its values)."""

    def __init__(self, units, value=ZERO):
        self.history = [[(-math.inf, -math.inf, frozenset([value]))] for _ in range(units)]

    @classmethod
    def unknown(cls, units):
        """A disk that may hold anything."""
        return cls(units, None)

    @property
    def units(self):
        """How large it is."""
        return len(self.history)

    def is_known(self):
        """Whether anything is known of it."""
        return any(None not in entries[-1][2] for entries in self.history)

    def begin(self, first, count, value, now):
        """A write was asked for; gives what `end` takes. Until then it may have happened or not."""
        entry = [now, math.inf, frozenset([value])]
        for unit in range(first, first + count):
            self.history[unit].append(entry)
        return (first, count, entry)

    def end(self, write, now):
        """The write was answered: nothing older is there from now on."""
        first, count, entry = write
        entry[1] = now
        if DISCARDED in entry[2]:
            return
        for unit in range(first, min(first + count, self.units)):
            entries = self.history[unit]
            if len(entries) > 24:
                self._forget(entries, now)

    @staticmethod
    def _forget(entries, now):
        """Drops what nobody who looks can still find: snapshots are of seconds ago at most."""
        settled = [at for at, entry in enumerate(entries) if entry[1] < now - 60 and DISCARDED not in entry[2]]
        if settled:
            del entries[: settled[-1]]

    def possible(self, unit, since, until):
        """What may be found in a unit by who looks at some moment from `since` to `until`."""
        values = set()
        for start, end, written in reversed(self.history[unit]):
            if start > until:
                continue
            values |= written
            if DISCARDED in written:
                values.discard(DISCARDED)
                values.add(ZERO)
            elif end <= since:
                break
        return values

    def frozen(self, since, until):
        """The disk as it was at a moment from `since` to `until`."""
        copy = Disk(0)
        copy.history = [[(-math.inf, -math.inf, frozenset(self.possible(unit, since, until)))] for unit in range(self.units)]
        return copy

    def resize(self, units, now):
        """It has another size from now on; what is new reads as zeroes."""
        del self.history[units:]
        self.history += [[(-math.inf, now, frozenset([ZERO]))] for _ in range(units - self.units)]

    def wrong(self, first, data, since, until):
        """The first unit of `data`, read between the two moments, that can't be; None if all is well."""
        for at in range(len(data) // UNIT):
            unit = first + at
            values = self.possible(unit, since, until)
            piece = data[at * UNIT : (at + 1) * UNIT]
            if None in values or any(piece == pattern(value, unit) for value in values):
                continue
            wanted = " or ".join("zeroes" if value == ZERO else f"write {value}" for value in sorted(values))
            return f"unit {unit} (byte {unit * UNIT}) should hold {wanted}, holds {found(piece)}"
        return None
