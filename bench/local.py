"""Part (b): a local qcow2 into a local qcow2, O_DIRECT on both sides."""

import os

import images
import measure
import qemu


def programs(setup, source):
    """The programs under test, by name, each a function of nothing that gives its cost."""
    disk = os.path.join(setup.folder, "local.out")
    log = os.path.join(setup.folder, "local.log")

    def headwater():
        if os.path.exists(disk):
            os.unlink(disk)
        return measure.run([setup.headwater, "stream", source, disk, "--exit-when-done", "--json"], log)

    def block_stream():
        images.overlay(disk, source)
        node = {"driver": "qcow2", "file": qemu.protocol_node("source-file", source), "read-only": True}
        return qemu.block_stream(node, disk, log)

    def convert():
        if os.path.exists(disk):
            os.unlink(disk)
        words = "convert -t none -T none -W -m 16 -f qcow2 -O qcow2".split()
        return measure.run(["qemu-img", *words, source, disk], log)

    table = {"headwater stream": headwater, "block-stream": block_stream, "qemu-img convert": convert}
    return {name: table[name] for name in table if setup.wants(name)}, disk


def run(setup):
    """The table of part (b)."""
    size = setup.local_size
    data, zeroes = size * 3 // 4, size // 8
    source = images.qcow2(os.path.join(setup.folder, f"local-{size}.qcow2"), size, data, zeroes)
    table, disk = programs(setup, source)
    allocated = {}

    def check(name):
        images.compare(source, "qcow2", disk, "qcow2")
        allocated[name] = os.stat(disk).st_blocks * 512

    middle = measure.rounds(table, setup.repeat, check)
    base = middle.get("block-stream")
    rows = []
    for name, cost in middle.items():
        rows.append([
            name,
            f"{cost.wall:.2f}",
            f"{data / images.MIB / cost.wall:.0f}",
            f"{base.wall / cost.wall:.2f}" if base else "-",
            f"{cost.cpu:.2f}",
            f"{cost.cpu / base.cpu:.2f}" if base else "-",
            f"{cost.rss / images.MIB:.0f}",
            f"{cost.faults:.0f}",
            f"{allocated[name] / images.MIB:.0f}",
        ])
    head = ["program", "wall s", "MiB/s of data", "times block-stream", "CPU s", "of block-stream's CPU", "peak MiB"]
    title = f"(b) qcow2 of {size // images.MIB} MiB ({data // images.MIB} data, {zeroes // images.MIB} zero), O_DIRECT"
    yield measure.table(title, [*head, "page faults", "MiB on disk"], rows)
