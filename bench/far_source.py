"""Part (a): a source some milliseconds away, over NBD and over HTTP, into a local qcow2."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import images
import measure
import qemu


@contextlib.contextmanager
def serving(command, ready, stderr=None):
    """A server that runs while the block does. `ready` gets the child and returns what the block is given."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
    try:
        yield ready(child)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()
        child.stdout.close()


def wait_for_socket(path):
    """Waits until a server has made its socket."""
    deadline = time.monotonic() + 10
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise measure.Failed(f"no server came up on {path}")
        time.sleep(0.01)


def nbdkit(folder, *words):
    """An nbdkit on a socket of its own; gives the socket's path."""
    path = os.path.join(folder, "source.sock")
    if os.path.exists(path):
        os.unlink(path)

    def ready(_):
        wait_for_socket(path)
        return path

    return serving(["nbdkit", "--foreground", "--unix", path, "--readonly", *words], ready)


def http(path, latency, rate=0):
    """The HTTP server of this folder, with a line of so many bytes a second; gives its URL."""
    server = os.path.join(os.path.dirname(os.path.abspath(__file__)), "http_server.py")
    return serving([sys.executable, server, path, str(latency), str(rate)], lambda child: child.stdout.readline().decode().strip())


def programs(setup, source, socket, url):
    """The programs under test, by name, each a function of nothing that gives its cost."""
    disk = os.path.join(setup.folder, "far.out")
    log = os.path.join(setup.folder, "far.log")
    uri = f"nbd+unix:///?socket={socket}"
    node = {"driver": "nbd", "server": {"type": "unix", "path": socket}, "read-only": True}

    def fresh():
        for path in (disk, disk + ".job"):
            if os.path.exists(path):
                os.unlink(path)
        # The far machine has its image in memory: what is measured is the distance, not this machine's disk.
        with open(source, "rb") as file:
            while file.read(16 << 20):
                pass

    def headwater():
        fresh()
        return measure.run([setup.headwater, "stream", url or uri, disk, "--exit-when-done", "--json"], log)

    def block_stream():
        fresh()
        images.qemu("qemu-img", "create", "-q", "-f", "qcow2", disk, str(setup.far_size))
        return qemu.block_stream(node, disk, log)

    def convert():
        fresh()
        # As it is by default: into the page cache, and not durable at the end, which headwater's result is.
        words = "convert -W -m 16 -f raw -O qcow2".split()
        return measure.run(["qemu-img", *words, uri, disk], log)

    def nbdcopy():
        fresh()
        return measure.run(["nbdcopy", uri, disk], log)

    table = {"headwater stream": headwater, "block-stream": block_stream, "qemu-img convert": convert, "nbdcopy": nbdcopy}
    return {name: table[name] for name in table if setup.wants(name)}, disk


def one_source(setup, title, source, socket, url):
    """Runs every program against one source and gives its table."""
    table, disk = programs(setup, source, socket, url)

    def check(name):
        images.compare(source, "raw", disk, "raw" if name == "nbdcopy" else "qcow2")

    middle = measure.rounds(table, setup.repeat, check)
    base = middle.get("block-stream")
    rows = []
    for name, cost in middle.items():
        ratio = f"{base.wall / cost.wall:.1f}" if base else "-"
        speed = setup.far_size / images.MIB / cost.wall
        rows.append([name, f"{cost.wall:.2f}", f"{speed:.0f}", ratio, f"{cost.cpu:.2f}", f"{cost.rss / images.MIB:.0f}"])
    head = ["program", "wall s", "MiB/s", "times block-stream", "CPU s", "peak MiB"]
    return measure.table(title, head, rows)


def run(setup):
    """The tables of part (a), as they come."""
    source = images.raw(os.path.join(setup.folder, "far.raw"), setup.far_size)
    mib = setup.far_size // images.MIB
    for latency in (1, 5, 20):
        with nbdkit(setup.folder, "--filter=delay", "file", source, f"rdelay={latency}ms") as socket:
            yield one_source(setup, f"(a) {mib} MiB over NBD, {latency} ms for each read", source, socket, None)
    for latency in (5, 20):
        with http(source, latency) as url, nbdkit(setup.folder, "curl", url) as socket:
            title = f"(a) {mib} MiB over HTTP, {latency} ms for each request (all but headwater through nbdkit-curl-plugin)"
            yield one_source(setup, title, source, socket, url)
