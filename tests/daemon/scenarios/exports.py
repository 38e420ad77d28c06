"""The NBD server and its exports, with QEMU's tools and libnbd as clients."""

import json

from drive import check, nbd, scenario
from drive.images import tool
from drive.jobs import export
from drive.ports import free_port


def disk(case, name="disk", size="4M", fill=None, **options):
    """A daemon with one raw disk; gives its monitor."""
    path = case.images.raw(f"{name}.raw", size, fill)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name=f"{name}-file", filename=path)
    qmp.run("blockdev-add", **{"driver": "raw", "node-name": name, "file": f"{name}-file", **options})
    return qmp


def serve(case, qmp, **more):
    """Starts the server on a socket of its own."""
    qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("nbd.sock")}}, **more)
    return case.path("nbd.sock")


def add(qmp, **options):
    """An export with few words."""
    qmp.run("block-export-add", **{"type_": "nbd", **options})


@scenario
def life(case):
    """Start, add, use, delete, stop."""
    qmp = disk(case, fill=5)
    qmp.run("query-block-exports")
    address = export(case, qmp, "disk")
    qmp.run("query-block-exports")
    nbd.io(address, "read -P 5 0 4M", "write -P 6 1M 64k", "flush")
    qmp.run("block-export-del", id="export-disk")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-disk")
    check(not nbd.reachable(address), "the export is still there")
    qmp.run("query-block-exports")
    qmp.run("nbd-server-stop")
    qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("nbd.sock")}})
    qmp.run("quit")
    case.images.write(case.path("disk.raw"), "read -P 6 1M 64k", form="raw")


@scenario
def server_refusals(case):
    """The server twice, none at all, an address that isn't one."""
    qmp = disk(case)
    qmp.refuse("nbd-server-stop")
    qmp.refuse("block-export-add", type_="nbd", id="e", node_name="disk")
    qmp.refuse("nbd-server-add", device="disk")
    qmp.refuse("nbd-server-remove", name="disk")
    qmp.refuse("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("nowhere/nbd.sock")}})
    qmp.refuse("nbd-server-start", addr={"type": "unix", "data": {}})
    qmp.refuse("nbd-server-start", addr={"type": "carrier-pigeon", "data": {}})
    qmp.refuse("nbd-server-start", addr={"type": "unix", "path": "x"})
    qmp.refuse("nbd-server-start")
    qmp.refuse("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("n.sock")}}, tls_creds="nothing")
    serve(case, qmp)
    qmp.refuse("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("other.sock")}})
    qmp.run("nbd-server-stop")
    qmp.refuse("nbd-server-stop")
    qmp.refuse("block-export-add", type_="nbd", id="e", node_name="disk")


@scenario
def export_refusals(case):
    """What block-export-add and -del refuse, and why."""
    qmp = disk(case, read_only=True)
    qmp.run("blockdev-add", driver="null-co", node_name="null", size=1 << 20, read_zeroes=True)
    serve(case, qmp)
    export_ = {"type_": "nbd", "id": "e", "node_name": "null"}
    qmp.refuse("block-export-add", **{**export_, "node_name": "nowhere"})
    qmp.refuse("block-export-add", **{**export_, "type_": "nfs"})
    qmp.refuse("block-export-add", type_="nbd", id="e")
    qmp.refuse("block-export-add", type_="nbd", node_name="null")
    qmp.refuse("block-export-add", **{**export_, "id": "0bad"})
    qmp.refuse("block-export-add", **{**export_, "id": ""})
    qmp.refuse("block-export-add", **{**export_, "id": "a b"})
    qmp.refuse("block-export-add", **export_, name="n" * 4097)
    qmp.refuse("block-export-add", **export_, description="d" * 4097)
    qmp.refuse("block-export-add", **export_, bitmap="b")
    qmp.refuse("block-export-add", **export_, bitmaps=["b"])
    qmp.refuse("block-export-add", **export_, unknown=True)
    qmp.refuse("block-export-add", **export_, iothread="nothing")
    qmp.refuse("block-export-add", type_="nbd", id="e", node_name="disk", writable=True)
    add(qmp, **export_)
    qmp.refuse("block-export-add", **export_)
    qmp.refuse("block-export-add", **{**export_, "id": "f"})
    qmp.refuse("block-export-del", id="nothing")
    qmp.refuse("block-export-del", id="e", mode="gently")
    qmp.refuse("block-export-del")
    qmp.refuse("blockdev-del", node_name="null")
    qmp.run("query-block-exports")


@scenario
def delete_safe_and_hard(case):
    """With a client connected, `safe` refuses and `hard` cuts it off."""
    qmp = disk(case, fill=1)
    client = nbd.Client(case, export(case, qmp, "disk"))
    qmp.refuse("block-export-del", id="export-disk")
    qmp.refuse("block-export-del", id="export-disk", mode="safe")
    client.do("read -P 1 0 64k")
    qmp.run("block-export-del", id="export-disk", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-disk")
    client.fails("read -P 1 0 64k")
    qmp.run("query-block-exports")
    qmp.run("blockdev-del", node_name="disk")


@scenario
def delete_after_client(case):
    """`safe` once the client is gone."""
    qmp = disk(case, fill=1)
    client = nbd.Client(case, export(case, qmp, "disk"))
    client.do("write -P 2 0 64k")
    client.close()
    qmp.poll(lambda: qmp.quiet("query-block-exports") is not None, "the daemon answers")
    qmp.run("block-export-del", id="export-disk", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-disk")


@scenario
def stop_with_client(case):
    """nbd-server-stop deletes the exports and cuts clients off."""
    qmp = disk(case, fill=1)
    client = nbd.Client(case, export(case, qmp, "disk"))
    add(qmp, id="second", node_name="disk", name="second")
    qmp.run("nbd-server-stop")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-disk")
    client.fails("read -P 1 0 64k")
    qmp.run("query-block-exports")


@scenario
def old_commands(case):
    """nbd-server-add and nbd-server-remove."""
    qmp = disk(case, fill=3)
    path = serve(case, qmp)
    qmp.run("nbd-server-add", device="disk", name="x", description="an old friend", writable=True)
    qmp.run("query-block-exports")
    nbd.io(nbd.uri(path, "x"), "read -P 3 0 64k", "write -P 4 0 64k")
    qmp.refuse("nbd-server-add", device="disk", name="x")
    qmp.refuse("nbd-server-add", device="nowhere")
    qmp.run("nbd-server-add", device="disk")
    client = nbd.Client(case, nbd.uri(path, "disk"), "-r")
    qmp.refuse("nbd-server-remove", name="disk")
    qmp.refuse("nbd-server-remove", name="nowhere")
    qmp.run("nbd-server-remove", name="disk", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="disk")
    client.fails("read -P 3 64k 64k")
    qmp.run("query-block-exports")


@scenario
def what_clients_see(case):
    """What a server tells about its exports."""
    qmp = disk(case)
    qmp.run("blockdev-add", driver="null-co", node_name="null", size=(1 << 20) + 512, read_zeroes=True)
    qmp.run("blockdev-add", driver="null-co", node_name="ro", size=1 << 20, read_zeroes=True, read_only=True)
    path = serve(case, qmp)
    add(qmp, id="a", node_name="disk", name="writable", description="a disk", writable=True)
    add(qmp, id="b", node_name="disk", name="plain")
    add(qmp, id="c", node_name="null", writable=True)
    add(qmp, id="d", node_name="ro", name="ro")
    add(qmp, id="e", node_name="disk", name="depth", allocation_depth=True)
    case.note("list", nbd.listing(nbd.uri(path)))
    qmp.run("query-block-exports")


@scenario
def two_exports(case):
    """Two exports of one node, two clients, the same data."""
    qmp = disk(case)
    path = serve(case, qmp)
    add(qmp, id="a", node_name="disk", name="a", writable=True)
    add(qmp, id="b", node_name="disk", name="b", writable=True)
    first, second = (nbd.Client(case, nbd.uri(path, name), "-t", "none") for name in "ab")
    first.do("write -P 9 1M 64k")
    second.do("read -P 9 1M 64k")
    second.do("write -P 8 1M 32k")
    first.do("read -P 8 1M 32k")
    qmp.run("block-export-del", id="a", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="a")
    second.do("read -P 8 1M 32k")
    second.close()


@scenario
def read_only_export(case):
    """An export that isn't writable refuses writes."""
    qmp = disk(case, fill=1)
    address = export(case, qmp, "disk", writable=False)
    nbd.io_fails(address, "write -P 2 0 64k")
    case.note("errors", nbd.shell(address, READ_ONLY))
    nbd.io(address, "read -P 1 0 4M", read_only=True)


READ_ONLY = """
for name, call in (("write", lambda: h.pwrite(b"x" * 512, 0)), ("trim", lambda: h.trim(512, 0)), ("zero", lambda: h.zero(512, 0))):
    h.set_strict_mode(0)
    try:
        call()
        print(name, "worked")
    except nbd.Error as error:
        print(name, error.errnum)
"""


@scenario
def bounds(case):
    """Requests beyond the end and of odd lengths."""
    qmp = disk(case, fill=1)
    address = export(case, qmp, "disk")
    case.note("answers", nbd.shell(address, BOUNDS))


BOUNDS = """
h.set_strict_mode(0)
size = h.get_size()
calls = {
    "read at the end": lambda: h.pread(512, size),
    "read over the end": lambda: h.pread(1024, size - 512),
    "write over the end": lambda: h.pwrite(b"x" * 1024, size - 512),
    "write at the end": lambda: h.pwrite(b"x" * 512, size),
    "trim over the end": lambda: h.trim(1024, size - 512),
    "zero over the end": lambda: h.zero(1024, size - 512),
    "odd read": lambda: h.pread(3, 5),
    "odd write": lambda: h.pwrite(b"xyz", 7),
    "empty read": lambda: h.pread(0, 0),
    "long read": lambda: h.pread(33 << 20, 0),
}
for name, call in calls.items():
    try:
        call()
        print(name, "worked")
    except nbd.Error as error:
        print(name, error.errnum)
print(h.pread(12, 4))
"""


@scenario
def max_connections(case):
    """One client at a time; the next one gets in when the first is gone."""
    qmp = disk(case, fill=1)
    path = serve(case, qmp, max_connections=1)
    add(qmp, id="e", node_name="disk", name="disk")
    first = nbd.Client(case, nbd.uri(path, "disk"), "-r")
    first.do("read -P 1 0 64k")
    first.close()
    nbd.io(nbd.uri(path, "disk"), "read -P 1 0 64k", read_only=True)


@scenario
def inet(case):
    """A server on TCP."""
    qmp = disk(case, fill=1)
    port = free_port(case)
    qmp.run("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}})
    add(qmp, id="e", node_name="disk", name="disk", writable=True)
    nbd.io(nbd.uri(("127.0.0.1", port), "disk"), "read -P 1 0 64k", "write -P 2 0 64k")
    qmp.run("nbd-server-stop")
    qmp.refuse("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1"}})


@scenario
def writethrough(case):
    """An export with writethrough."""
    qmp = disk(case, fill=1)
    address = export(case, qmp, "disk", writethrough=True)
    nbd.io(address, "write -P 2 0 64k", "read -P 2 0 64k")
    qmp.run("query-block-exports")


@scenario
def block_status(case):
    """base:allocation and qemu:allocation-depth of a chain."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    address = export(case, qmp, "top", writable=False, allocation_depth=True)
    nodes = nbd.tool("nbdinfo", "--map=qemu:allocation-depth", address)
    case.note("depth", nodes)
    case.note("allocation", nbd.tool("nbdinfo", "--map", address))
    nbd.tool("qemu-img", "map", "-f", "raw", address)


@scenario
def tools(case):
    """QEMU's tools on an export: convert from and to, compare, map, bench of commands."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp, discard="unmap")
    address = export(case, qmp, "top")
    nbd.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", address, chain.expected)
    nbd.tool("qemu-img", "convert", "-f", "raw", "-O", "raw", address, case.path("out.raw"))
    case.images.same("out.raw", chain.expected, form="raw")
    source = case.images.raw("source.raw", "4M")
    case.images.write(source, "write -P 12 1M 1M", "write -P 13 3M 512k", form="raw")
    nbd.tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, address)
    nbd.tool("qemu-img", "compare", "-f", "raw", "-F", "raw", address, source)
    nbd.io(address, "write -z 1M 64k", "discard 2M 1M", "write -P 1 -f 0 64k", "aio_write -P 4 512k 64k", "aio_flush", "read -P 4 512k 64k")
    nbd.tool("nbdcopy", address, case.path("copy.raw"))
    qmp.run("quit")
    case.images.check("top.qcow2")
    case.images.same("top.qcow2", "copy.raw")


@scenario
def quit_with_client(case):
    """quit while a client is connected: what it flushed is there."""
    qmp = disk(case)
    client = nbd.Client(case, export(case, qmp, "disk"))
    client.do("write -P 7 0 64k")
    client.do("flush")
    qmp.run("quit")
    client.fails("read -P 7 0 64k")
    case.images.write(case.path("disk.raw"), "read -P 7 0 64k", form="raw")


@scenario
def other_types(case):
    """Export types that need what isn't here."""
    qmp = disk(case)
    qmp.attempt("block-export-add", type_="fuse", id="f", node_name="disk", mountpoint=case.path("missing"))
    qmp.run("query-block-exports")


@scenario
def threads(case):
    """Objects of type iothread and exports that name one."""
    qmp = disk(case, fill=1)
    qmp.run("object-add", qom_type="iothread", id="thread")
    address = export(case, qmp, "disk", iothread="thread", fixed_iothread=False)
    nbd.io(address, "read -P 1 0 64k", "write -P 2 0 64k")
    qmp.run("query-block-exports")
    qmp.attempt("object-del", id="thread")
    qmp.run("block-export-del", id="export-disk")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-disk")


def extents(address):
    """What qemu-img tells of an export: one request for each of its extents, however long."""
    found = json.loads(tool("qemu-img", "map", "--output=json", "-f", "raw", address))
    return [(extent["start"], extent["length"], extent["zero"], extent["data"]) for extent in found]


@scenario
def long_requests(case):
    """Lengths of more than 32 bits, which QEMU's tools use where a server has extended headers: of a disk of 8 TiB."""
    image = case.images.qcow2("huge.qcow2", "8T", options="cluster_size=2M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="file", filename=image)
    qmp.run("blockdev-add", driver="qcow2", node_name="huge", file="file")
    address = export(case, qmp, "huge")
    check(extents(address) == [(0, 8 << 40, True, False)], "an empty disk is not one hole")
    nbd.io(address, "write -P 5 3T 64k", "write -z -n 4T 3T", "read -P 5 3T 64k", "read -P 0 5T 64k", "flush")
    found = extents(address)
    check([extent[:2] for extent in found if not extent[2]] == [(3 << 40, 2 << 20)], f"data elsewhere: {found}")
    nbd.io(address, "write -z -n 0 8T", "read -P 0 3T 64k", "flush")
    check(all(extent[2] for extent in extents(address)), "not all is zero")
    nbd.io_fails(address, "write -z -n 7T 2T")
    qmp.run("quit")
    case.images.check(image)


@scenario
def long_requests_of_a_node(case):
    """The same with the daemon as the client, of a server that holds 8 TiB of nothing."""
    socket = case.path("far.sock")
    image = case.images.qcow2("far.qcow2", "8T", options="cluster_size=2M")
    case.spawn(["qemu-nbd", "--persistent", "--shared=8", "-f", "qcow2", "-k", socket, image])
    qmp = case.daemon().qmp
    qmp.poll(lambda: nbd.reachable(nbd.uri(socket)), "qemu-nbd")
    qmp.run("blockdev-add", driver="nbd", node_name="far", server={"type": "unix", "path": socket})
    address = export(case, qmp, "far")
    check(extents(address) == [(0, 8 << 40, True, False)], "an empty disk is not one hole")
    nbd.io(address, "write -P 5 3T 64k", "write -z -n 4T 1T", "read -P 5 3T 64k", "read -P 0 2T 64k", "flush")
    found = extents(address)
    check([extent[:2] for extent in found if not extent[2]] == [(3 << 40, 2 << 20)], f"data elsewhere: {found}")
    qmp.run("quit")
