"""The runner: every scenario against both daemons, each run in a process of its own, and the comparison."""

import argparse
import concurrent.futures
import fnmatch
import importlib
import multiprocessing
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
SUITE = os.path.dirname(HERE)
sys.path[0] = SUITE

from drive import compare  # noqa: E402
from drive.case import SCENARIOS, Case, Failed  # noqa: E402
from drive.skip import Skipped  # noqa: E402

# Seconds that one run of a scenario may take.
LIMIT = 90


@dataclass
class Run:
    """What came of one run of one scenario against one daemon."""

    name: str
    side: str
    seconds: float = 0
    failure: str = ""
    skipped: str = ""
    crashed: bool = False
    again: int = 0
    streams: dict = field(default_factory=dict)


def patiently(name, side, program, keep):
    """Runs a scenario; called in a child process. The reference is let crash twice, because it does now and then; headwater isn't."""
    for again in range(3):
        result = one(name, side, program, keep)
        result.again = again
        if not (result.crashed and side == "reference"):
            break
    return result


def one(name, side, program, keep):
    """Runs a scenario once."""

    def expired(*_):
        raise Failed(f"not done within {LIMIT} s")

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(LIMIT)
    result = Run(name, side)
    began = time.monotonic()
    folder = os.path.realpath(tempfile.mkdtemp(prefix="daemon-"))
    case = Case(program, folder, patient=program[0] == "qemu-storage-daemon")
    try:
        SCENARIOS[name](case)
        case.finish()
    except Skipped as reason:
        result.skipped = str(reason)
    except Failed as failure:
        time.sleep(0.1)
        result.crashed = case.crashed()
        result.failure = f"{failure} ({where(failure)}{', the daemon crashed' if result.crashed else ''})"
    except Exception:
        result.failure = traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        case.abandon()
    result.streams = case.transcript.clean()
    result.failure = result.failure.replace(folder, "<dir>")
    result.seconds = time.monotonic() - began
    if keep:
        print(f"{name} {side}: {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def where(failure):
    """The line of the scenario that a failure came from."""
    lines = [f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(failure.__traceback__) if "/scenarios/" in f.filename]
    return " < ".join(reversed(lines)) or "in the runner"


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests/daemon/run", description=__doc__)
    default = os.path.join(SUITE, "..", "..", "target", "debug", "headwater")
    parser.add_argument("--headwater", default=default, metavar="PATH", help="the program under test (default: target/debug/headwater)")
    parser.add_argument("--reference", default="qemu-storage-daemon", metavar="PATH", help="what it is compared with")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="scenarios to run, as stream.* or *cancel*; repeatable")
    parser.add_argument("--reference-only", action="store_true", help="run the reference alone")
    parser.add_argument("--both-reference", action="store_true", help="compare the reference with itself: shows what isn't deterministic")
    parser.add_argument("--show", action="store_true", help="print the transcripts")
    parser.add_argument("--list", action="store_true", help="print the names of the scenarios")
    parser.add_argument("--keep", action="store_true", help="leave the folders of the runs, and say where they are")
    parser.add_argument("--jobs", type=int, default=max(4, os.cpu_count() or 1), metavar="N", help="runs at the same time")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="run each scenario so many times")
    return parser.parse_args()


def chosen(patterns):
    """The names of the scenarios that match, all of them without patterns."""
    package = importlib.import_module("scenarios")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"scenarios.{module.name}")
    names = list(SCENARIOS)
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def sides(options):
    """The programs to run: the words that start each, by side."""
    reference = [options.reference]
    if options.reference_only:
        return {"reference": reference}
    if options.both_reference:
        return {"reference": reference, "headwater": reference}
    path = os.path.abspath(options.headwater)
    if not os.access(path, os.X_OK):
        sys.exit(f"{path} isn't there: build headwater, or name it with --headwater (--reference-only runs without)")
    return {"reference": reference, "headwater": [path, "daemon"]}


def run_all(names, programs, options):
    """Runs everything and yields, scenario by scenario, the runs by side."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=None) as pool:
        waiting = [
            {side: pool.submit(patiently, name, side, program, options.keep) for side, program in programs.items()}
            for _ in range(options.repeat)
            for name in names
        ]
        for runs in waiting:
            yield {side: run.result() for side, run in runs.items()}


def judge(runs, intended, options):
    """Prints what came of a scenario. Gives the numbers of (failures, differences not intended, intended ones)."""
    name = next(iter(runs.values())).name
    lines, failures = [], 0
    found = []
    for side, run in runs.items():
        if run.again and not run.failure:
            lines.append(f"  {side} crashed {run.again} times, and was run again")
        if run.skipped:
            lines.append(f"  {side} skipped: {run.skipped}")
        if run.failure:
            difference = compare.Difference(name, "failed", compare.ABSENT, run.failure)
            if side == "headwater" and not runs["reference"].failure and any([entry.covers(difference) for entry in intended]):
                lines.append(f"  {side} fails as intended: {run.failure.strip()}")
            else:
                failures += 1
                lines.append(f"  {side} FAILED: {run.failure.strip()}")
        if options.show:
            lines += [f"  {side} {stream}: {label}: {compare.shown(value)}" for stream, entries in run.streams.items() for label, value in entries]
    if len(runs) == 2 and not any(run.skipped for run in runs.values()):
        parallel = getattr(SCENARIOS[name], "parallel", False)
        found = compare.compare(name, runs["reference"].streams, runs["headwater"].streams, parallel)
    meant = [difference for difference in found if any([entry.covers(difference) for entry in intended])]
    others = [difference for difference in found if difference not in meant]
    lines += [str(difference) for difference in others]
    if lines or meant:
        worst = "FAIL" if failures or others else "ok"
        print(f"{worst} {name} ({' / '.join(f'{run.seconds:.1f}s' for run in runs.values())}, {len(meant)} intended differences)")
        print("\n".join(lines), flush=True)
    return failures, len(others), len(meant)


def main():
    """Runs the suite; the exit status is 1 if anything failed or differed."""
    options = arguments()
    names = chosen(options.only)
    if options.list:
        print("\n".join(names))
        return 0
    programs = sides(options)
    against_itself = options.both_reference or options.reference_only
    intended = [] if against_itself else compare.load(os.path.join(SUITE, "differences.toml"))
    began = time.monotonic()
    totals = [0, 0, 0]
    slow = []
    for runs in run_all(names, programs, options):
        totals = [sum(pair) for pair in zip(totals, judge(runs, intended, options))]
        slow += [(run.seconds, run.name, side) for side, run in runs.items()]
    stale = [e for e in intended if not e.used and not e.timing and covered(e.scenario, names)]
    for entry in stale:
        print(f"STALE in differences.toml: {entry.scenario} at {entry.at} ({entry.reason}): nothing differs there any more, take it out")
    worst = ", ".join(f"{name} {seconds:.1f}s" for seconds, name, _ in sorted(slow, reverse=True)[:3])
    print(
        f"{len(names)} scenarios, {' and '.join(programs)}: {totals[0]} failures, {totals[1]} differences, "
        f"{totals[2]} intended differences, {len(stale)} stale entries; {time.monotonic() - began:.0f} s (longest: {worst})"
    )
    return 1 if totals[0] or totals[1] or stale else 0


def covered(pattern, ran):
    """Whether every scenario that a pattern names did run."""
    return all(name in ran for name in SCENARIOS if fnmatch.fnmatchcase(name, pattern))


if __name__ == "__main__":
    sys.exit(main())
