"""Random walks through a storage daemon: commands of several monitors beside clients, and a model that says what every byte must be.

A failure prints its seed, is kept as a list of actions that can be replayed, and is made shorter if that is wished.
"""

import argparse
import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
SUITE = os.path.dirname(HERE)
sys.path[0] = SUITE

from walks import differ, shrink  # noqa: E402
from walks.generate import Generator  # noqa: E402
from walks.walk import Broken, Walk  # noqa: E402

MODES = ("beside", "single", "kills", "reference")

# Actions of one walk.
STEPS = 60


async def generated(walk, seed, mode, steps, trace):
    """A walk whose actions are chosen on the way. They are added to `trace`."""
    chance = random.Random(seed)
    generator = Generator(chance, walk, mode != "single", kills=mode == "kills")
    await walk.start()

    async def take(action):
        trace.append(action)
        await step(walk, action, mode)

    for action in generator.first():
        await take(action)
        if walk.failure:
            return
    for _ in range(steps):
        await take(generator.next())
        if walk.failure or walk.ending:
            return
    if mode == "kills":
        await take({"do": "kill"})


async def step(walk, action, mode):
    """One action; where nothing happens beside each other, everything comes to rest after it."""
    await walk.do(action)
    if mode == "single" and action["do"] == "qmp" and not walk.failure:
        await walk.settle()
        await walk.look_at_nodes()


async def replayed(walk, mode, trace):
    """A walk whose actions are given."""
    await walk.start()
    for action in trace:
        await step(walk, action, mode)
        if walk.failure or walk.ending:
            return


async def whole(program, folder, mode, make):
    """A walk from its start to the end of its daemon. Gives it, with its `failure` if there is one."""
    walk = Walk(program, folder)
    try:
        await make(walk)
        if walk.failure is None and not walk.ending:
            await walk.finish()
    except Broken as broken:
        walk.fail(str(broken))
    except Exception:
        walk.fail("in the walk itself: " + traceback.format_exc())
    finally:
        await walk.abandon()
    printed = walk.printed()
    if "panicked" in printed:
        walk.failure = f"{walk.failure or ''} the daemon panicked: {printed}"
    return walk


def run(program, mode, seed=None, steps=STEPS, trace=None, keep=None):
    """A walk in a folder of its own: (failure or None, its actions, its log, answers)."""
    folder = keep or os.path.realpath(tempfile.mkdtemp(prefix="walk-"))
    os.makedirs(folder, exist_ok=True)
    given = trace is not None
    trace = trace if given else []
    make = (lambda walk: replayed(walk, mode, trace)) if given else (lambda walk: generated(walk, seed, mode, steps, trace))
    try:
        walk = asyncio.run(whole(program, folder, mode, make))
        return walk.failure, trace, walk.log + ["the daemon printed:", walk.printed()], walk.answers
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def job(program, mode, seed, steps):
    """`run` in a process of its own."""
    began = time.monotonic()
    if mode == "reference":
        failure, trace, _ = differ.run(program, ["qemu-storage-daemon"], seed, steps, os.path.join(SUITE, "differences.toml"))
        return seed, mode, failure, trace, [], time.monotonic() - began
    failure, trace, log, _ = run(program, mode, seed, steps)
    return seed, mode, failure, trace, log, time.monotonic() - began


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests/daemon/walk", description=__doc__)
    default = os.path.join(SUITE, "..", "..", "target", "debug", "headwater")
    parser.add_argument("--headwater", default=default, metavar="PATH", help="the program under test (default: target/debug/headwater)")
    parser.add_argument("--mode", action="append", choices=MODES, help="commands beside each other and clients; one by one; with a kill; one by one beside the reference (default: all)")
    parser.add_argument("--seeds", default=os.environ.get("HEADWATER_SEEDS", "7"), metavar="N|A..B", help="how many walks of each mode, or which (HEADWATER_SEEDS)")
    parser.add_argument("--seed", type=int, default=os.environ.get("HEADWATER_SEED"), help="this one only (HEADWATER_SEED)")
    parser.add_argument("--steps", type=int, default=STEPS, help="actions of a walk (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=max(2, os.cpu_count() or 1), metavar="N", help="walks at the same time")
    parser.add_argument("--seconds", type=float, default=0, metavar="S", help="begin no more walks after so long")
    parser.add_argument("--replay", metavar="FILE", help="the actions that a failure left")
    parser.add_argument("--shrink", action="store_true", help="make the actions of a failure fewer, as long as it fails")
    parser.add_argument("--keep", metavar="DIR", help="leave the folder of a replay")
    parser.add_argument("--failures", default=os.path.join(SUITE, "..", "..", "target", "walks"), metavar="DIR", help="where failures are kept")
    return parser.parse_args()


def seeds(options):
    """The seeds to try."""
    if options.seed is not None:
        return [int(options.seed)]
    first, dots, last = options.seeds.partition("..")
    return range(int(first), int(last)) if dots else range(int(first))


def tell(options, program, seed, mode, failure, trace, log):
    """Prints a failure and keeps what replays it."""
    os.makedirs(options.failures, exist_ok=True)
    path = os.path.join(options.failures, f"{mode}-{seed}.json")
    if options.shrink and mode != "reference":
        trace, failure = shrink.shorter(trace, failure, lambda fewer: run(program, mode, trace=fewer)[0])
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"mode": mode, "seed": seed, "failure": failure, "actions": trace}, file)
        file.write("\n")
    with open(path + ".log", "w", encoding="utf-8") as file:
        file.write("\n".join(log) + "\n")
    print(f"FAILED {mode} seed {seed}: {failure}\n  again: tests/daemon/walk --mode {mode} --seed {seed}, or --replay {path}", flush=True)


def replay(options, program):
    """Runs the actions of a failure again."""
    with open(options.replay, encoding="utf-8") as file:
        kept = json.load(file)
    failure, trace, log, _ = run(program, kept["mode"], trace=kept["actions"], keep=options.keep)
    print("\n".join(log))
    if failure:
        tell(options, program, kept["seed"], kept["mode"], failure, trace, log)
    print(f"{len(trace)} actions: {failure or 'nothing failed'}")
    return 1 if failure else 0


def main():
    """Runs walks; the exit status is 1 if one failed."""
    options = arguments()
    program = [os.path.abspath(options.headwater), "daemon"]
    if options.replay:
        return replay(options, program)
    began = time.monotonic()
    modes = options.mode or MODES
    wanted = iter([(mode, seed) for seed in seeds(options) for mode in modes])
    failed = done = 0
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        running = set()
        while True:
            while len(running) < options.jobs and not (options.seconds and time.monotonic() - began > options.seconds):
                one = next(wanted, None)
                if one is None:
                    break
                running.add(pool.submit(job, program, *one, options.steps))
            if not running:
                break
            finished, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for result in finished:
                seed, mode, failure, trace, log, _ = result.result()
                done += 1
                if failure:
                    failed += 1
                    tell(options, program, seed, mode, failure, trace, log)
    print(f"{done} walks, {failed} failed; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
