"""Part (c): serving over NBD, random reads of 4 KiB: CPU for each at depth 32, latency at depth 1."""

import json
import os
import subprocess
from dataclasses import dataclass

import images
import measure
import servers


@dataclass
class Reads:
    """What one run of fio saw, and what the server spent on it."""

    each_cpu: float  # microseconds of the server's CPU for each read
    rate: float  # reads a second
    latency: float  # microseconds, mean
    tail: float  # microseconds, 99th percentile
    rss: int = 0


def fio(setup, socket, depth, pid):
    """Random reads for a while against a server whose process is known."""
    before = measure.cpu_of(pid)
    words = f"--name=reads --ioengine=nbd --rw=randread --bs=4k --iodepth={depth} --time_based".split()
    words += [f"--uri=nbd+unix:///disk?socket={socket}", f"--runtime={setup.seconds}", "--randseed=1", "--output-format=json", "--thread"]
    done = subprocess.run(["fio", *words], check=True, stdout=subprocess.PIPE, cwd=setup.folder)
    spent = measure.cpu_of(pid) - before
    text = done.stdout.decode()
    read = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    spread = read["clat_ns"]
    tail = spread.get("percentile", {}).get("99.000000", 0)
    return Reads(spent / read["total_ios"] * 1e6, read["iops"], spread["mean"] / 1000, tail / 1000, measure.peak_of(pid))


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
    programs = {"headwater serve": servers.headwater, "qemu-storage-daemon": servers.storage_daemon}
    programs = {name: programs[name] for name in programs if setup.wants(name)}
    deep, alone = [], []
    for picture, (image, form) in pictures(setup).items():
        found = {(name, depth): [] for name in programs for depth in (32, 1)}
        for turn in range(setup.repeat):
            for name, server in list(programs.items())[:: 1 if turn % 2 == 0 else -1]:
                measure.settle()
                with server(setup, image, form, servers.Export()) as (pid, socket):
                    for depth in (32, 1):
                        found[name, depth].append(fio(setup, socket, depth, pid))
        for name in programs:
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
