"""The same walk, one command after the other, through headwater and through the reference: what each accepts, and what is there afterwards."""

import asyncio
import fnmatch
import os
import random
import shutil
import tempfile
import tomllib

from walks import images
from walks.generate import Generator
from walks.walk import Broken, Walk


class Difference(Exception):
    """Where the two part."""


def intended(path):
    """The differences that are meant to be: entries `[[walk]]` of differences.toml."""
    with open(path, "rb") as file:
        return tomllib.load(file).get("walk", [])


async def state(walk):
    """What is there: jobs and their states, exports, and nodes that a command named."""
    jobs = {job["id"]: job["status"] for job in await walk.ask("query-jobs")}
    # While a job runs its own node is in the way of requests on one side.
    running = any(status != "concluded" for status in jobs.values())
    exports = {export["id"]: None if running else export["node-name"] for export in await walk.ask("query-block-exports")}
    nodes = await walk.ask("query-named-block-nodes", flat=True)
    named = {node["node-name"]: node["drv"] for node in nodes if not node["node-name"].startswith("#")}
    return {"jobs": jobs, "exports": exports, "nodes": named}


async def perform(walk, action):
    """One action; gives what came of it: its error if it is a command, and the state afterwards."""
    if action["do"] == "image":
        images.make(walk, action)
        return None
    walk.answers.clear()
    await walk.do(action)
    await walk.settle()
    if walk.world.nodes:
        await walk.look_at_nodes()
    if action["do"] != "qmp":
        return None
    error = walk.answers[-1][1] if walk.answers else None
    return {"error": error, **await state(walk)}


async def both(ours, theirs, seed, steps, allowed, trace):
    """Walks through both until they part, which is a `Difference`, or for so many steps. Gives how many commands both accepted."""
    generator = Generator(random.Random(seed), ours, concurrent=False, traffic=False)
    await ours.start()
    await theirs.start()
    accepted = 0

    async def take(action):
        nonlocal accepted
        trace.append(action)
        results = [await perform(walk, action) for walk in (ours, theirs)]
        if ours.failure:
            raise Difference(ours.failure)
        if results[0] is None:
            return True
        accepted += results[0]["error"] is None and results[1]["error"] is None
        return judge(action, *results, allowed, ours.slow)

    for action in generator.first():
        if not await take(action):
            return accepted
    for _ in range(steps):
        if not await take(generator.next()):
            return accepted
    return accepted


def judge(action, ours, theirs, allowed, slow):
    """Compares what came of an action; `slow` are the jobs with a limit. False if they part here as it is meant to be."""
    told = [result["error"]["desc"] if result["error"] else "accepted" for result in (ours, theirs)]
    kinds = [result["error"]["class"] if result["error"] else None for result in (ours, theirs)]
    command = action["command"]
    if kinds[0] != kinds[1]:
        if any(matches(entry, command, told) for entry in allowed):
            return False
        raise Difference(f"{command} {action['args']}\n    headwater: {told[0]}\n    reference: {told[1]}")
    for job in slow:
        if ours["jobs"].get(job) != theirs["jobs"].get(job):
            # One of them does more in its first step.
            return False
    for what in ("jobs", "exports", "nodes"):
        if ours[what] != theirs[what]:
            sides = [str({key: value for key, value in one[what].items() if other[what].get(key) != value}) for one, other in ((ours, theirs), (theirs, ours))]
            if any(matches(entry, f"{what} after {command}", sides) for entry in allowed):
                return False
            raise Difference(f"{what} after {command} {action['args']} ({told[0]})\n    headwater: {sides[0]}\n    reference: {sides[1]}")
    return True


def matches(entry, command, sides):
    """Whether an entry is about such a place."""
    patterns = (entry["command"], entry.get("headwater", "*"), entry.get("reference", "*"))
    return all(fnmatch.fnmatchcase(text, pattern.replace("[", "[[]")) for text, pattern in zip((command, *sides), patterns))


async def _walk(program, reference, folders, seed, steps, allowed, trace):
    ours, theirs = Walk(program, folders[0]), Walk(reference, folders[1], plain=True)
    try:
        accepted = await both(ours, theirs, seed, steps, allowed, trace)
        await ours.finish()
        return ours.failure, accepted
    except Difference as difference:
        return f"they part: {difference}", 0
    except Broken as broken:
        await asyncio.sleep(0.5)
        if theirs.child and theirs.child.poll() is not None and theirs.child.returncode < 0:
            # The reference crashes now and then.
            return None, 0
        return str(broken), 0
    finally:
        await theirs.abandon()
        await ours.abandon()


def run(program, reference, seed, steps, differences):
    """A walk through both: (failure or None, its actions, how many commands both accepted)."""
    folders = [os.path.realpath(tempfile.mkdtemp(prefix="walk-")) for _ in range(2)]
    trace = []
    try:
        failure, accepted = asyncio.run(_walk(program, reference, folders, seed, steps, intended(differences), trace))
        return failure, trace, accepted
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
