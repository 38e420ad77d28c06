"""Part (c): serving over NBD, random reads of 4 KiB: CPU for each at depth 32, latency at depth 1."""

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass

import far_source
import images
import measure
import qemu


@dataclass
class Reads:
    """What one run of fio saw, and what the server spent on it."""

    each_cpu: float  # microseconds of the server's CPU for each read
    rate: float  # reads a second
    latency: float  # microseconds, mean
    tail: float  # microseconds, 99th percentile
    rss: int = 0


def fio(setup, uri, depth, pid):
    """Random reads for a while against a server whose process is known."""
    before = measure.cpu_of(pid)
    words = f"--name=reads --ioengine=nbd --rw=randread --bs=4k --iodepth={depth} --time_based".split()
    words += [f"--uri={uri}", f"--runtime={setup.seconds}", "--randseed=1", "--output-format=json", "--thread"]
    done = subprocess.run(["fio", *words], check=True, stdout=subprocess.PIPE, cwd=setup.folder)
    spent = measure.cpu_of(pid) - before
    text = done.stdout.decode()
    read = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    spread = read["clat_ns"]
    tail = spread.get("percentile", {}).get("99.000000", 0)
    return Reads(spent / read["total_ios"] * 1e6, read["iops"], spread["mean"] / 1000, tail / 1000, measure.peak_of(pid))


@contextlib.contextmanager
def headwater(setup, image, form):
    """`headwater serve` on a socket; gives its process id and the URI."""
    socket = os.path.join(setup.folder, "serve.sock")
    if os.path.exists(socket):
        os.unlink(socket)
    uri = f"nbd+unix:///disk?socket={socket}"
    words = [setup.headwater, "serve", image, "--format", form, "--read-only", "--serve", uri]

    def ready(child):
        far_source.wait_for_socket(socket)
        return child.pid

    log = os.path.join(setup.folder, "serve.log")
    with open(log, "wb") as out, far_source.serving(words, ready, stderr=out) as pid:
        yield pid, uri


@contextlib.contextmanager
def storage_daemon(setup, image, form):
    """qemu-storage-daemon with an NBD export; gives its process id and the URI."""
    socket = os.path.join(setup.folder, "serve.sock")
    if os.path.exists(socket):
        os.unlink(socket)
    daemon = qemu.StorageDaemon(os.path.join(setup.folder, "serve.log"))
    try:
        daemon.add(**node(image, form))
        daemon.command("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
        daemon.command("block-export-add", type="nbd", id="e", name="disk", **{"node-name": "node-0"})
        yield daemon.child.pid, f"nbd+unix:///disk?socket={socket}"
    finally:
        daemon.quit()


def node(image, form):
    """The nodes of an image and its whole chain, each file with O_DIRECT and io_uring; `node-0` is the top."""
    out = subprocess.run(["qemu-img", "info", "--backing-chain", "--output=json", "-f", form, image], check=True, stdout=subprocess.PIPE)
    below = None
    layers = json.loads(out.stdout)
    for depth, layer in reversed(list(enumerate(layers))):
        options = {"driver": layer["format"], "node-name": f"node-{depth}", "read-only": True}
        options["file"] = qemu.protocol_node(f"file-{depth}", layer["filename"])
        if layer["format"] == "qcow2":
            options["backing"] = below
        below = options
    return below


def pictures(setup):
    """The images served, by name: path and format."""
    size, folder = setup.serve_size, setup.folder
    full = images.qcow2(os.path.join(folder, f"serve-{size}.qcow2"), size, size, 0)
    return {
        "raw": (images.raw(os.path.join(folder, f"serve-{size}.raw"), size), "raw"),
        "full qcow2": (full, "qcow2"),
        "empty overlay": (images.overlay(os.path.join(folder, "serve-overlay.qcow2"), full), "qcow2"),
        "chain of 8": (images.chain(folder, size, 8), "qcow2"),
    }


def run(setup):
    """The tables of part (c), as they come."""
    servers = {"headwater serve": headwater, "qemu-storage-daemon": storage_daemon}
    servers = {name: servers[name] for name in servers if setup.wants(name)}
    deep, alone = [], []
    for picture, (image, form) in pictures(setup).items():
        found = {(name, depth): [] for name in servers for depth in (32, 1)}
        for turn in range(setup.repeat):
            for name, server in list(servers.items())[:: 1 if turn % 2 == 0 else -1]:
                measure.settle()
                with server(setup, image, form) as (pid, uri):
                    for depth in (32, 1):
                        found[name, depth].append(fio(setup, uri, depth, pid))
        for name in servers:
            rows = [sorted(found[name, 32], key=lambda r: r.each_cpu), sorted(found[name, 1], key=lambda r: r.latency)]
            at32, at1 = (runs[len(runs) // 2] for runs in rows)
            deep.append([picture, name, at32])
            alone.append([picture, name, at1])
    yield measure.table(
        f"(c) 4 KiB random reads over NBD at depth 32, image of {setup.serve_size // images.MIB} MiB, O_DIRECT",
        ["image", "server", "CPU us for each", "of qemu-storage-daemon's", "reads/s", "peak MiB"],
        [
            [image, name, f"{r.each_cpu:.1f}", against(deep, image, r, "each_cpu"), f"{r.rate:.0f}", f"{r.rss / images.MIB:.0f}"]
            for image, name, r in deep
        ],
    )
    yield measure.table(
        "(c) the same at depth 1",
        ["image", "server", "mean us", "of qemu-storage-daemon's", "99% us", "CPU us for each"],
        [
            [image, name, f"{r.latency:.1f}", against(alone, image, r, "latency"), f"{r.tail:.1f}", f"{r.each_cpu:.1f}"]
            for image, name, r in alone
        ],
    )


def against(rows, image, reads, field):
    """The figure as a part of qemu-storage-daemon's on the same image."""
    base = [r for i, name, r in rows if i == image and name == "qemu-storage-daemon"]
    return f"{getattr(reads, field) / getattr(base[0], field):.2f}" if base else "-"
