"""Running programs and seeing what they cost: wall time, CPU, memory, page faults; medians and tables."""

import os
import statistics
import subprocess
import time
from dataclasses import dataclass

TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    """What one run of one process took."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    rss: int  # bytes at the peak
    faults: int  # minor page faults


class Failed(Exception):
    """A program under test ended with an error."""


def reap(child, since):
    """Waits for a child and returns its cost since `since` (time.monotonic)."""
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - since
    child.returncode = os.waitstatus_to_exitcode(status)
    cost = Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, usage.ru_minflt)
    return child.returncode, cost


def run(command, log):
    """Runs a command to its end, its output to the file `log`."""
    with open(log, "wb") as out:
        since = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        code, cost = reap(child, since)
    if code != 0:
        with open(log, errors="replace") as out:
            raise Failed(f"{' '.join(command)}\nended with {code}:\n{out.read()[-2000:]}")
    return cost


def cpu_of(pid):
    """CPU seconds that a running process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_of(pid):
    """Bytes of memory that a running process had at its peak."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def settle():
    """Nothing dirty and, where we may, nothing cached, before a run."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as drop:
            drop.write("3")
    except OSError:
        pass


def rounds(programs, repeat, check):
    """Runs each program `repeat` times, taking turns, and gives the median cost by name.

    Every other turn goes backwards, so that nobody always comes first. `check(name)` is called after each program's first run. A program that fails is reported and left out.
    """
    costs = {name: [] for name in programs}
    for turn in range(repeat):
        for name in list(costs)[:: 1 if turn % 2 == 0 else -1]:
            settle()
            try:
                costs[name].append(programs[name]())
                if turn == 0:
                    check(name)
            except (Failed, subprocess.CalledProcessError) as error:
                del costs[name]
                print(f"FAILED, left out: {name}: {error}\n", flush=True)
    return {name: median(runs) for name, runs in costs.items()}


def median(costs):
    """The cost with each figure the median of its own."""
    return Cost(*(statistics.median(getattr(cost, name) for cost in costs) for name in ("wall", "cpu", "rss", "faults")))


def table(title, head, rows):
    """A markdown table under a title."""
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
