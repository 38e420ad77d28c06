"""Part (h): what requests cost the server, and how many get through: vhost-user-blk and NBD, reads and writes."""

import json
import os
import statistics
import subprocess
from dataclasses import dataclass

import images
import measure
import servers

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Work:
    """A kind of requests, by the words of `load`; `touch` writes each cluster for the first time."""

    title: str
    way: str
    block: int
    depth: int

    @property
    def reads(self):
        return self.way.endswith("read")


WORKS = [
    Work("4K random read, depth 1", "randread", 4096, 1),
    Work("4K random read, depth 32", "randread", 4096, 32),
    Work("128K sequential read, depth 8", "read", 128 << 10, 8),
    Work("4K random write, depth 1", "randwrite", 4096, 1),
    Work("4K random write, depth 32", "randwrite", 4096, 32),
    Work("128K sequential write, depth 8", "write", 128 << 10, 8),
]
# Not over again: each run needs an overlay that has nothing yet.
FIRST = [
    Work("4K first write, depth 1", "touch", 4096, 1),
    Work("4K first write, depth 32", "touch", 4096, 32),
]


@dataclass
class Cost:
    """What one run was like."""

    each_cpu: float  # microseconds of the server's CPU for each request
    rate: float  # requests a second


def vhost(setup, socket, work):
    """Requests through a virtqueue: how many, in how many seconds."""
    load = os.path.join(os.path.dirname(setup.headwater), "examples/load")
    words = [load, socket, work.way, str(work.block), str(work.depth), str(setup.seconds)]
    done = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return done["requests"], done["seconds"]


def nbd(setup, socket, work):
    """The same by fio's NBD engine."""
    way = "write:60k" if work.way == "touch" else work.way
    words = ["fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={socket}", "--thread", "--randseed=1"]
    words += [f"--rw={way}", f"--bs={work.block}", f"--iodepth={work.depth}", f"--runtime={setup.seconds}", "--norandommap"]
    words += ["--output-format=json"] + ([] if work.way == "touch" else ["--time_based"])
    text = subprocess.run(words, check=True, stdout=subprocess.PIPE, cwd=setup.folder).stdout.decode()
    job = json.loads(text[text.index("{") :])["jobs"][0]
    side = job["read"] if work.reads else job["write"]
    return side["total_ios"], side["runtime"] / 1000


CLIENTS = {"vhost-user-blk": vhost, "nbd": nbd}


def one(setup, export, work, pid, socket):
    """One run of one kind of requests against a server that is there."""
    before = measure.cpu_of(pid)
    requests, seconds = CLIENTS[export.kind](setup, socket, work)
    spent = measure.cpu_of(pid) - before
    return Cost(spent / requests * 1e6, requests / seconds)


def written(path, backing, size):
    """An overlay that has all its clusters."""
    if not os.path.exists(path):
        images.overlay(path + ".part", backing)
        script = "".join(f"write -q -P 9 {at} 1M\n" for at in range(0, size, images.MIB))
        images.qemu("qemu-io", "-t", "none", path + ".part", script=script)
        os.rename(path + ".part", path)
    return path


def pictures(setup):
    """The images, by name: path, format, and what is done to them."""
    size, folder = setup.cost_size, setup.folder
    name = lambda what: os.path.join(folder, f"cost-{size}-{what}")  # noqa: E731
    reads, writes = [w for w in WORKS if w.reads], [w for w in WORKS if not w.reads]
    full = images.qcow2(name("full.qcow2"), size, size, 0)
    chain = images.chain(folder, size, 8)
    below = os.path.join(folder, f"chain-{size}-6.qcow2")
    return {
        "raw": (images.raw(name("raw.raw"), size), "raw", WORKS),
        "full qcow2": (full, "qcow2", WORKS),
        "empty overlay": (images.overlay(name("empty.qcow2"), full), "qcow2", reads),
        "written overlay": (written(name("written.qcow2"), full, size), "qcow2", writes),
        "chain of 8": (chain, "qcow2", reads),
        "chain of 8, top written": (written(name("chain.qcow2"), below, size), "qcow2", writes),
        "new overlay": (name("new.qcow2"), "qcow2", FIRST),
    }


def warm(image, form):
    """Reads an image's whole chain, so that it is in the page cache."""
    out = subprocess.run(["qemu-img", "info", "--backing-chain", "--output=json", "-f", form, image], check=True, stdout=subprocess.PIPE)
    for layer in json.loads(out.stdout):
        with open(layer["filename"], "rb") as file:
            while file.read(16 << 20):
                pass


def one_picture(setup, export, program, image, form, works):
    """Costs of all kinds of requests to one server."""
    costs = {}
    groups = [[work] for work in works] if works is FIRST else [works]
    for group in groups:
        if works is FIRST:
            images.overlay(image, os.path.join(setup.folder, f"cost-{setup.cost_size}-full.qcow2"))
        measure.settle()
        if not export.direct:
            warm(image, form)
        with program(setup, image, form, export) as (pid, socket):
            for work in group:
                costs[work.title] = one(setup, export, work, pid, socket)
    return costs


def rows_of(setup, export):
    """The rows of one table: image and work, and of each program its costs, turn by turn."""
    programs = {"headwater serve": servers.headwater, "qemu-storage-daemon": servers.storage_daemon}
    for picture, (image, form, works) in pictures(setup).items():
        export.writable = any(not work.reads for work in works)
        kept = [work for work in works if setup.row in f"{picture}, {work.title}"]
        if not kept:
            continue
        works = FIRST if works is FIRST else kept
        turns = []
        for turn in range(setup.repeat):
            order = list(programs)[:: 1 if turn % 2 == 0 else -1]
            turns.append({name: one_picture(setup, export, programs[name], image, form, works) for name in order})
        for work in works:
            yield picture, work, [[turn[name][work.title] for turn in turns] for name in programs]


def line(picture, work, ours, theirs):
    """A row: medians, and the medians of the ratios within each turn."""
    typical = lambda costs, field: statistics.median(getattr(cost, field) for cost in costs)  # noqa: E731
    ratio = lambda field: statistics.median(getattr(a, field) / getattr(b, field) for a, b in zip(ours, theirs))  # noqa: E731
    cells = [picture, work.title]
    for field, digits in (("each_cpu", 1), ("rate", 0)):
        cells += [f"{typical(costs, field):.{digits}f}" for costs in (ours, theirs)] + [f"{ratio(field):.2f}"]
    return cells


def run(setup):
    """The tables of part (h), one for each kind of export and each way to the files."""
    head = ["image", "requests", "CPU us for each", "qsd's", "ratio", "requests/s", "qsd's", "ratio"]
    for kind in CLIENTS:
        for direct in (True, False):
            way = "O_DIRECT" if direct else "page cache"
            title = f"(h) {kind}, {way}"
            if setup.table in title:
                rows = [line(picture, work, *costs) for picture, work, costs in rows_of(setup, servers.Export(kind, direct))]
                yield measure.table(f"{title}, image of {setup.cost_size // images.MIB} MiB", head, rows)
