"""Part (d): a check of large images full of metadata; the data are holes, so that only tables are read."""

import array
import os
import struct
import sys

import images
import measure

CLUSTER = 64 << 10
PER_TABLE = CLUSTER // 8
PER_BLOCK = CLUSTER // 2
COPIED = 1 << 63
TIB = 1 << 40


def big_endian(numbers):
    """A table of 64-bit numbers as it is on disk."""
    table = array.array("Q", numbers)
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()


def full(path, size, scattered):
    """A qcow2 of `size` bytes whose clusters all have a place, but for 1/64 at the end that are zero clusters: a file system may not take
    larger files. In the order of the disk, or `scattered` over all of the file."""
    if os.path.exists(path):
        return path
    guests = size // CLUSTER
    mapped = guests - guests // 64
    l2s = guests // PER_TABLE
    l1_clusters = -(-l2s * 8 // CLUSTER)
    blocks = 1
    while True:
        table_clusters = -(-blocks * 8 // CLUSTER)
        first_l2 = 1 + table_clusters + blocks + l1_clusters
        data = first_l2 + l2s
        needed = -(-(data + mapped) // PER_BLOCK)
        if needed == blocks:
            break
        blocks = needed
    table = 1
    first_block = table + table_clusters
    l1 = first_block + blocks
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, size, 0, l2s, l1 * CLUSTER, table * CLUSTER,
                         table_clusters, 0, 0, 0, 0, 0, 4, 104)
    with open(path + ".part", "wb") as file:
        def put(cluster, data):
            file.seek(cluster * CLUSTER)
            file.write(data)

        put(0, header)
        put(table, big_endian(range(first_block * CLUSTER, l1 * CLUSTER, CLUSTER)))
        last = data + mapped - (blocks - 1) * PER_BLOCK
        ones = b"\0\1" * PER_BLOCK
        for block in range(blocks):
            put(first_block + block, ones if block < blocks - 1 else ones[: last * 2])
        put(l1, big_endian(range(first_l2 * CLUSTER + COPIED, data * CLUSTER + COPIED, CLUSTER)))
        # A prime that divides no number of clusters here: each place is taken once, far from the last.
        stride = 1_000_003 if scattered else 1
        for l2 in range(l2s):
            guest = range(l2 * PER_TABLE, (l2 + 1) * PER_TABLE)
            places = (COPIED | (data + i * stride % mapped) * CLUSTER if i < mapped else 1 for i in guest)
            put(first_l2 + l2, big_endian(places))
        file.truncate((data + mapped) * CLUSTER)
    os.rename(path + ".part", path)
    return path


def run(setup):
    """The table of part (d)."""
    rows = []
    for size, scattered in [(2 * TIB, False), (16 * TIB, False), (16 * TIB, True)]:
        size //= setup.divide
        name = f"full-{size}{'-scattered' if scattered else ''}.qcow2"
        path = full(os.path.join(setup.folder, name), size, scattered)
        log = os.path.join(setup.folder, "check.log")
        commands = {
            "headwater check": [setup.headwater, "check", path],
            "qemu-img check": ["qemu-img", "check", "-T", "none", path],
        }
        table = {
            name: lambda command=command: measure.run(command, log)
            for name, command in commands.items()
            if setup.wants(name)
        }
        middle = measure.rounds(table, setup.repeat, lambda _: None)
        base = middle.get("qemu-img check")
        what = f"{size / TIB:g} TiB" + (", scattered" if scattered else "")
        for name, cost in middle.items():
            times = f"{base.wall / cost.wall:.2f}" if base else "-"
            peak = f"{cost.rss / images.MIB:.0f}"
            rows.append([what, name, f"{cost.wall:.2f}", times, f"{cost.cpu:.2f}", peak])
    head = ["image", "program", "wall s", "times qemu-img", "CPU s", "peak MiB"]
    yield measure.table("(d) check of images with clusters of 64 KiB, nearly all of them in use", head, rows)
