"""Part (e): a source at the end of a link of 1 Gbit/s, at several distances, and how much of the link is used."""

import os

import far_source
import images
import measure
import qemu

# Bytes a second.
LINK = 125_000_000

DISTANCES = (1, 5, 20, 80)  # milliseconds


def utilisation(size, wall, rate=LINK):
    """The part of the link that was used, of 1."""
    return size / wall / rate


def nbd(setup, source, latency):
    """An NBD server at the end of such a link. It begins to answer as many requests at once as come."""
    words = ["--threads", "64", "--filter=rate", "--filter=delay", "file", source]
    return far_source.nbdkit(setup.folder, *words, f"rdelay={latency}ms", f"rate={LINK * 8}")


def programs(setup, socket, url):
    """The programs under test, by name, each a function of nothing that gives its cost; and where the result is."""
    disk = os.path.join(setup.folder, "link.out")
    log = os.path.join(setup.folder, "link.log")
    uri = f"nbd+unix:///?socket={socket}"

    def fresh():
        if os.path.exists(disk):
            os.unlink(disk)

    def stream(source):
        fresh()
        return measure.run([setup.headwater, "stream", source, disk, "--exit-when-done", "--json"], log)

    def block_stream():
        fresh()
        images.qemu("qemu-img", "create", "-q", "-f", "qcow2", disk, str(setup.link_size))
        node = {"driver": "nbd", "server": {"type": "unix", "path": socket}, "read-only": True}
        return qemu.block_stream(node, disk, log)

    def nbdcopy():
        fresh()
        return measure.run(["nbdcopy", uri, disk], log)

    table = {
        "headwater stream, NBD": lambda: stream(uri),
        "headwater stream, HTTP": lambda: stream(url),
        "block-stream, NBD": block_stream,
        "nbdcopy, NBD": nbdcopy,
    }
    return {name: table[name] for name in table if setup.wants(name)}, disk


def run(setup):
    """The table of part (e)."""
    size = setup.link_size
    source = images.raw(os.path.join(setup.folder, f"link-{size}.raw"), size)
    found = {}
    for latency in DISTANCES:
        with far_source.http(source, latency, LINK) as url, nbd(setup, source, latency) as socket:
            table, disk = programs(setup, socket, url)

            def check(name):
                images.compare(source, "raw", disk, "raw" if name.startswith("nbdcopy") else "qcow2")

            for name, cost in measure.rounds(table, setup.repeat, check).items():
                found.setdefault(name, {})[latency] = cost.wall
    rows = []
    for name, walls in found.items():
        cells = [f"{walls[ms]:.2f} ({utilisation(size, walls[ms]):.0%})" if ms in walls else "-" for ms in DISTANCES]
        rows.append([name, *cells])
    title = f"(e) {size // images.MIB} MiB over a link of 1 Gbit/s: wall s (and how much of the link)"
    yield measure.table(title, ["program", *(f"{ms} ms" for ms in DISTANCES)], rows)
