"""For how long a guest waited for its disk, by what its machine traces: unlike the time to user space, it doesn't depend on how quick the processor is."""

import re

EVENTS = ["virtio_blk_handle_read", "virtio_blk_rw_complete"]

LINE = re.compile(r"\d+@(\d+\.\d+):(\w+) .*?\breq (0x[0-9a-f]+)")


def words(path):
    """QEMU's options that trace to this file."""
    return ["-msg", "timestamp=on", "-D", path, *(word for event in EVENTS for word in ("-trace", event))]


def reads(lines):
    """When each read began and ended, in the order in which they began."""
    begun, found = {}, []
    for line in lines:
        parts = LINE.match(line)
        if not parts:
            continue
        when, request = float(parts[1]), parts[3]
        if parts[2] == EVENTS[0]:
            begun[request] = when
        elif request in begun:
            found.append((begun.pop(request), when))
    return sorted(found)


def waited(spans):
    """Seconds in which at least one of these was under way."""
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def of(path):
    """Seconds that the machine with this trace waited for reads."""
    with open(path, encoding="ascii", errors="replace") as trace:
        return waited(reads(trace))
