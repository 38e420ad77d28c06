"""Part (f): what a guest's small requests cost while a local stream runs, and what the stream gets meanwhile."""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass

import far_source
import images
import measure
import qemu

# The guest's own part, behind what is streamed: it is local from the start.
OWN = 256 * images.MIB


@dataclass
class Latency:
    """What fio saw of one kind of requests."""

    median: float  # microseconds
    tail: float  # microseconds, 99th percentile
    rate: float  # bytes a second


@dataclass
class Phase:
    """One kind of requests beside one stream."""

    idle: Latency
    streaming: Latency
    alone: float  # bytes a second that the stream takes without a guest
    beside: float  # and with one

    @property
    def share(self):
        """What the stream takes of what the guest leaves to it."""
        left = self.alone - self.streaming.rate
        return self.beside / left if left > 0 else 0.0


def latency_of(text):
    """Reads fio's JSON, which may come after words of its own."""
    job = json.loads(text[text.index("{") :])["jobs"][0]
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    percentile = side["clat_ns"]["percentile"]
    return Latency(percentile["50.000000"] / 1000, percentile["99.000000"] / 1000, side["bw_bytes"])


def guest(setup, uri, kind, seconds):
    """Requests of 4 KiB, one at a time, in the guest's own part (`misses` goes where the stream has yet to come)."""
    start, size = (setup.first_size * 3 // 4, setup.first_size // 4) if kind == "misses" else (setup.first_size, OWN)
    words = f"--name=guest --ioengine=nbd --bs=4k --iodepth=1 --time_based --runtime={seconds * 1000:.0f}ms --norandommap".split()
    words += [f"--rw={'randwrite' if kind == 'writes' else 'randread'}", f"--offset={start}", f"--size={size}"]
    words += [f"--uri={uri}", "--randrepeat=0", "--output-format=json", "--thread"]
    done = subprocess.run(["fio", *words], check=True, stdout=subprocess.PIPE, cwd=setup.folder)
    return latency_of(done.stdout.decode())


def fresh(setup, source):
    """An overlay that lacks all but the guest's own part, and is longer than its source by that."""
    disk = os.path.join(setup.folder, "first.out")
    for path in (disk, os.path.join(setup.folder, ".first.out.headwater")):
        if os.path.isfile(path):
            os.unlink(path)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", source, disk]
    images.qemu(*words, str(setup.first_size + OWN))
    steps = range(setup.first_size, setup.first_size + OWN, 8 * images.MIB)
    images.qemu("qemu-io", "-t", "none", disk, script="".join(f"write -q -P 7 {at} 8M\n" for at in steps))
    return disk


class Headwater:
    """`headwater stream`, paused until it is told to go on."""

    def __init__(self, setup, source, disk):
        self.uri = f"nbd+unix:///disk?socket={setup.folder}/first.sock"
        self.control = os.path.join(setup.folder, "first.ctl")
        words = [setup.headwater, "stream", source, disk, "--serve", self.uri, "--control", self.control, "--rate", "1"]
        self.log = open(os.path.join(setup.folder, "first.log"), "wb")
        self.stack = contextlib.ExitStack()
        wait = lambda _: far_source.wait_for_socket(self.control)  # noqa: E731
        self.stack.enter_context(far_source.serving([*words, "--json", *setup.headwater_words], wait, stderr=self.log))
        self.tell("pause")
        self.tell("rate 0")

    def tell(self, command):
        """One command at the control socket, and its answer."""
        with socket.socket(socket.AF_UNIX) as to:
            to.connect(self.control)
            to.sendall(command.encode() + b"\n")
            answer = to.makefile().readline()
        if not answer.startswith("ok"):
            raise measure.Failed(f"{command}: {answer}")
        return answer[3:]

    def go(self):
        """Streams on."""
        self.tell("resume")

    def stop(self):
        """Streams no more."""
        self.tell("pause")

    def copied(self):
        """Bytes so far, and whether that is all."""
        status = json.loads(self.tell("status"))
        return status["copied"], status["state"] == "completed"

    def close(self):
        self.stack.close()
        self.log.close()


class BlockStream:
    """block-stream of qemu-storage-daemon."""

    def __init__(self, setup, source, disk):
        path = os.path.join(setup.folder, "first.sock")
        self.uri = f"nbd+unix:///disk?socket={path}"
        self.daemon = qemu.StorageDaemon(os.path.join(setup.folder, "first.log"))
        self.runs = False
        below = {"driver": "qcow2", "file": qemu.protocol_node("source-file", source), "read-only": True}
        self.daemon.add(**{**below, "node-name": "source"})
        self.daemon.add(**qemu.protocol_node("overlay-file", disk))
        self.daemon.add(driver="qcow2", node_name="overlay", file="overlay-file", backing="source", discard="unmap")
        self.daemon.command("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        export = {"node-name": "overlay", "writable": True}
        self.daemon.command("block-export-add", type="nbd", id="e", name="disk", **export)

    def go(self):
        """Streams on."""
        if self.runs:
            self.daemon.command("block-job-resume", device="stream")
        else:
            self.daemon.command("block-stream", **{"job-id": "stream", "device": "overlay"})
        self.runs = True

    def stop(self):
        """Streams no more."""
        self.daemon.command("block-job-pause", device="stream")

    def copied(self):
        """Bytes so far, and whether that is all."""
        jobs = self.daemon.command("query-block-jobs")
        return (jobs[0]["offset"], False) if jobs else (0, True)

    def close(self):
        if self.daemon.command("query-block-jobs"):
            self.daemon.command("block-job-cancel", device="stream", force=True)
            self.daemon.wait_for("BLOCK_JOB_CANCELLED")
        self.daemon.quit()


def rate_while(program, work):
    """Does `work` while the stream runs: what it gives, and the stream's bytes a second meanwhile."""
    program.go()
    time.sleep(0.3)
    (before, _), since = program.copied(), time.monotonic()
    result = work()
    (after, over), until = program.copied(), time.monotonic()
    if over:
        raise measure.Failed("the stream was over before the guest: a larger image is needed")
    program.stop()
    return result, (after - before) / (until - since)


def one_phase(setup, start, source, kind):
    """Measures one kind of requests, idle and beside the stream, in one process."""
    disk = fresh(setup, source)
    measure.settle()
    program = start(setup, source, disk)
    try:
        guest(setup, program.uri, kind, 0.3)
        idle = guest(setup, program.uri, kind, setup.seconds / 2)
        _, alone = rate_while(program, lambda: time.sleep(setup.seconds / 4))
        time.sleep(0.3)
        streaming, beside = rate_while(program, lambda: guest(setup, program.uri, kind, setup.seconds / 2))
    finally:
        program.close()
        os.unlink(disk)
    return Phase(idle, streaming, alone, beside)


def row(kind, name, phases):
    """A line of the table: medians of all runs, and of the ratios within each run."""
    typical = lambda figure: statistics.median(figure(phase) for phase in phases)  # noqa: E731
    return [
        kind,
        name,
        f"{typical(lambda p: p.idle.median):.0f}",
        f"{typical(lambda p: p.streaming.median):.0f}",
        f"{typical(lambda p: p.streaming.median / p.idle.median):.2f}",
        f"{typical(lambda p: p.idle.tail):.0f}",
        f"{typical(lambda p: p.streaming.tail):.0f}",
        f"{typical(lambda p: p.streaming.tail / p.idle.tail):.2f}",
        f"{typical(lambda p: p.beside) / images.MIB:.0f}",
        f"{typical(lambda p: p.share):.0%}",
    ]


def run(setup):
    """The table of part (f)."""
    size = setup.first_size
    source = images.qcow2(os.path.join(setup.folder, f"first-{size}.qcow2"), size, size, 0)
    programs = {"headwater stream": Headwater, "block-stream": BlockStream}
    programs = {name: programs[name] for name in programs if setup.wants(name)}
    rows = []
    for kind in ("reads", "writes", "misses"):
        phases = {name: [] for name in programs}
        for turn in range(setup.repeat):
            for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
                phases[name].append(one_phase(setup, programs[name], source, kind))
        rows += [row(kind, name, phases[name]) for name in programs]
    yield measure.table(
        f"(f) 4 KiB over NBD at depth 1 while a local qcow2 of {size // images.MIB} MiB streams, O_DIRECT",
        ["guest", "stream", "median us", "streaming", "times", "p99 us", "streaming", "times", "stream MiB/s", "of what is left"],
        rows,
    )
