"""Nodes: every driver, the generic options, what is refused, what queries show."""

import json
import os
import subprocess

from drive import check, nbd, scenario
from drive.jobs import export
from drive.skip import Skipped


def show(qmp):
    """All nodes."""
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def file(case):
    """file, with its options."""
    path = case.images.raw("disk.raw", "1M", 3)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="plain", filename=path)
    show(qmp)
    qmp.run("query-named-block-nodes")
    qmp.run("blockdev-del", node_name="plain")
    for number, options in enumerate(
        (
            {"cache": {"direct": True}},
            {"cache": {"direct": True, "no-flush": True}, "aio": "native"},
            {"aio": "io_uring"},
            {"aio": "threads", "locking": "on"},
            {"locking": "off"},
            {"read-only": True, "force-share": True},
            {"auto-read-only": True},
            {"discard": "unmap", "detect-zeroes": "unmap"},
            {"drop-cache": False},
            {"x-check-cache-dropped": True},
        )
    ):
        qmp.run("blockdev-add", **{"driver": "file", "node_name": f"n{number}", "filename": path, **options})
        show(qmp)
        qmp.run("blockdev-del", node_name=f"n{number}")
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=path, aio="native")
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=path, detect_zeroes="unmap")
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=path, force_share=True)
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=case.path("missing"))
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=case.folder)
    qmp.refuse("blockdev-add", driver="host_device", node_name="n", filename=path)
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename="")


@scenario
def host_device(case):
    """host_device over a loop device."""
    path = case.images.raw("disk.raw", "2M", 3)
    device = case.loop_device(path)
    if device is None:
        raise Skipped("no loop device to be had")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="host_device", node_name="disk", filename=device)
    show(qmp)
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=device)
    address = export(case, qmp, "disk")
    nbd.io(address, "read -P 3 0 2M", "write -P 4 64k 64k", "discard 1M 64k", "flush")
    qmp.run("quit")
    subprocess.run(["sync", device], check=True)
    case.images.write(path, "read -P 4 64k 64k", form="raw")


@scenario
def raw_window(case):
    """raw with offset and size."""
    path = case.images.raw("disk.raw", "1M", 1)
    case.images.write(path, "write -P 2 256k 128k", form="raw")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="file", filename=path)
    qmp.run("blockdev-add", driver="raw", node_name="window", file="file", offset=256 << 10, size=128 << 10)
    show(qmp)
    address = export(case, qmp, "window")
    nbd.io(address, "read -P 2 0 128k", "write -P 5 64k 64k")
    nbd.io_fails(address, "read 100k 64k")
    qmp.refuse("blockdev-add", driver="raw", node_name="n", file="file", offset=2 << 20)
    qmp.refuse("blockdev-add", driver="raw", node_name="n", file="file", size=2 << 20)
    qmp.refuse("blockdev-add", driver="raw", node_name="n", file="file", size=1000)
    qmp.attempt("blockdev-add", driver="raw", node_name="odd", file="file", offset=1000, size=512)
    qmp.refuse("block_resize", node_name="window", size=1 << 20)
    qmp.run("quit")
    case.images.write(path, "read -P 1 0 256k", "read -P 5 320k 64k", "read -P 1 384k 640k", form="raw")


@scenario
def qcow2(case):
    """qcow2 with backing by reference, inline, null and from the header."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    file = {"driver": "file", "filename": chain.file("top")}
    qmp.run("blockdev-add", driver="qcow2", node_name="header", file=file)
    show(qmp)
    qmp.run("query-named-block-nodes")
    qmp.run("blockdev-del", node_name="header")
    show(qmp)
    inline = {"driver": "qcow2", "node-name": "inline-mid", "file": {"driver": "file", "filename": chain.file("mid")}, "backing": None}
    qmp.run("blockdev-add", driver="qcow2", node_name="inline", file=file, backing=inline)
    show(qmp)
    qmp.run("blockdev-del", node_name="inline")
    base = {"driver": "qcow2", "node-name": "inner", "file": {"driver": "file", "filename": chain.file("base")}}
    qmp.run("blockdev-add", **{**inline, "node-name": "mid", "backing": base})
    qmp.run("blockdev-add", driver="qcow2", node_name="by-name", file=file, backing="mid")
    show(qmp)
    qmp.refuse("blockdev-del", node_name="mid")
    qmp.refuse("blockdev-del", node_name="inner")
    qmp.run("blockdev-del", node_name="by-name")
    qmp.run("blockdev-add", driver="qcow2", node_name="none", file=file, backing=None)
    show(qmp)
    qmp.run("blockdev-del", node_name="none")
    qmp.run("blockdev-del", node_name="mid")
    qmp.run("blockdev-add", driver="qcow2", node_name="tuned", file=file, lazy_refcounts=True, l2_cache_size=1 << 20, cache_clean_interval=0, discard_no_unref=False)
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file=file, backing="missing")
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file="missing")
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file=file, backing={"driver": "file", "filename": case.path("missing")})


@scenario
def wrong_formats(case):
    """An image that isn't what one says, is cut off, or has a backing file that is gone."""
    path = case.images.raw("disk.raw", "1M", 1)
    case.images.qcow2("base.qcow2", "1M")
    case.images.qcow2("orphan.qcow2", None, "base.qcow2")
    with open(case.path("short.qcow2"), "wb") as short, open(case.path("orphan.qcow2"), "rb") as whole:
        short.write(whole.read(50))
    open(case.path("empty"), "wb").close()
    os.unlink(case.path("base.qcow2"))
    qmp = case.daemon().qmp
    for name in ("disk.raw", "orphan.qcow2", "short.qcow2", "empty", "missing"):
        qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": case.path(name)})
    qmp.run("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": case.path("orphan.qcow2")}, backing=None)
    qmp.refuse("blockdev-add", driver="qed", node_name="q", file={"driver": "file", "filename": path})
    show(qmp)


@scenario
def names(case):
    """Node names: duplicate, ill-formed, missing, at their longest."""
    qmp = case.daemon().qmp
    null = {"driver": "null-co", "size": 65536}
    qmp.run("blockdev-add", **null, node_name="n")
    qmp.refuse("blockdev-add", **null, node_name="n")
    qmp.refuse("blockdev-add", **null, node_name="")
    qmp.refuse("blockdev-add", **null, node_name="0n")
    qmp.refuse("blockdev-add", **null, node_name="a b")
    qmp.refuse("blockdev-add", **null, node_name="#block1")
    qmp.refuse("blockdev-add", **null, node_name="é")
    qmp.refuse("blockdev-add", **null)
    qmp.run("blockdev-add", **null, node_name="n" * 31)
    qmp.refuse("blockdev-add", **null, node_name="n" * 32)
    qmp.run("blockdev-add", **null, node_name="A-b_c.9")
    qmp.refuse("blockdev-del", node_name="nothing")
    qmp.run("blockdev-del", node_name="n")
    qmp.refuse("blockdev-del", node_name="n")
    show(qmp)


@scenario
def nested_delete(case):
    """A child that was given inline goes with its parent, one by reference stays; one inside can't be deleted."""
    path = case.images.raw("disk.raw", "1M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="raw", node_name="outer", file={"driver": "file", "node-name": "inner", "filename": path})
    qmp.refuse("blockdev-del", node_name="inner")
    qmp.run("blockdev-del", node_name="outer")
    show(qmp)
    qmp.run("blockdev-add", driver="file", node_name="inner", filename=path)
    qmp.run("blockdev-add", driver="raw", node_name="outer", file="inner")
    qmp.refuse("blockdev-del", node_name="inner")
    qmp.run("blockdev-del", node_name="outer")
    show(qmp)


@scenario
def locks(case):
    """One image for two writers: refused within a daemon and between two; readers get in with force-share only."""
    path = case.images.raw("disk.raw", "1M")
    case.images.qcow2("disk.qcow2", "1M")
    first = case.daemon().qmp
    file = {"driver": "file", "filename": path}
    first.run("blockdev-add", driver="raw", node_name="a", file=file)
    address = export(case, first, "a")
    first.attempt("blockdev-add", driver="raw", node_name="b", file=file)
    first.attempt("block-export-add", type_="nbd", id="e", node_name="b", writable=True)
    first.attempt("blockdev-add", driver="raw", node_name="c", read_only=True, file={**file, "read-only": True})
    qcow2 = {"driver": "qcow2", "file": {"driver": "file", "filename": case.path("disk.qcow2")}}
    first.run("blockdev-add", **qcow2, node_name="q")
    first.refuse("blockdev-add", **qcow2, node_name="q2")
    second = case.daemon().qmp
    second.attempt("blockdev-add", driver="raw", node_name="a", file=file)
    second.refuse("blockdev-add", **qcow2, node_name="q")
    second.refuse("blockdev-add", **qcow2, node_name="q", read_only=True)
    second.run("blockdev-add", **qcow2, node_name="q", read_only=True, force_share=True)
    second.run("blockdev-del", node_name="q")
    first.run("blockdev-del", node_name="q")
    second.run("blockdev-add", **qcow2, node_name="q")
    nbd.io(address, "write 0 64k")


@scenario
def lock_of_others(case):
    """An image that qemu-io has open for writing is refused, and the other way round."""
    case.images.qcow2("disk.qcow2", "1M")
    other = nbd.Client(case, case.path("disk.qcow2"), form="qcow2")
    qmp = case.daemon().qmp
    options = {"driver": "qcow2", "node_name": "n", "file": {"driver": "file", "filename": case.path("disk.qcow2")}}
    qmp.refuse("blockdev-add", **options)
    other.close()
    qmp.run("blockdev-add", **options)
    out = nbd.tool("qemu-io", "-f", "qcow2", "-c", "read 0 64k", case.path("disk.qcow2"), status=None)
    check("lock" in out, f"qemu-io got in: {out}")


@scenario
def read_only(case):
    """read-only and auto-read-only, also on files that can't be written."""
    path = case.images.raw("disk.raw", "1M", 1)
    loop = case.loop_device(path, read_only=True)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="raw", node_name="ro", read_only=True, file={"driver": "file", "filename": path})
    address = export(case, qmp, "ro", writable=False)
    qmp.refuse("block-export-add", type_="nbd", id="w", node_name="ro", name="w", writable=True)
    nbd.io(address, "read -P 1 0 1M", read_only=True)
    qmp.run("blockdev-add", driver="raw", node_name="auto", auto_read_only=True, file={"driver": "file", "filename": path, "auto-read-only": True})
    show(qmp)
    if loop:
        qmp.refuse("blockdev-add", driver="host_device", node_name="l", filename=loop)
        qmp.run("blockdev-add", driver="host_device", node_name="l", filename=loop, auto_read_only=True)
        show(qmp)


@scenario
def null(case):
    """null-co and null-aio."""
    qmp = case.daemon().qmp
    for driver in ("null-co", "null-aio"):
        qmp.run("blockdev-add", driver=driver, node_name=driver, size=1 << 20, read_zeroes=True)
        qmp.run("blockdev-add", driver=driver, node_name=f"{driver}-slow", latency_ns=1000000)
        qmp.run("blockdev-add", driver=driver, node_name=f"{driver}-default")
        qmp.refuse("blockdev-add", driver=driver, node_name="n", latency_ns=-1)
    show(qmp)
    address = export(case, qmp, "null-co")
    nbd.io(address, "read -P 0 0 1M", "write -P 5 0 64k", "discard 0 64k", "flush")


@scenario
def detect_zeroes(case):
    """detect-zeroes and discard, seen in the map of the image."""
    qmp = case.daemon().qmp
    for mode, discard in (("off", "ignore"), ("on", "ignore"), ("on", "unmap"), ("unmap", "unmap")):
        name = f"{mode}-{discard}"
        case.images.qcow2(f"{name}.qcow2", "1M", writes=["write -P 1 0 1M"])
        qmp.run("blockdev-add", driver="qcow2", node_name=name, discard=discard, detect_zeroes=mode, file={"driver": "file", "filename": case.path(f"{name}.qcow2"), "discard": discard})
        address = export(case, qmp, name, start=mode == "off")
        nbd.io(address, "write -P 0 0 128k", "write -P 0 256k 64k", "discard 512k 128k", "write -z -u 768k 64k", "write -z 896k 64k", "flush")
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", detect_zeroes="unmap")
    qmp.run("quit")
    for mode in ("off-ignore", "on-ignore", "on-unmap", "unmap-unmap"):
        case.note(mode, [extent[:2] + extent[4:] for extent in case.images.map(f"{mode}.qcow2")])
        case.images.check(f"{mode}.qcow2", leaks=True)


@scenario
def discard_raw(case):
    """discard on a raw file makes holes only with discard=unmap."""
    qmp = case.daemon().qmp
    for discard in ("ignore", "unmap"):
        path = case.images.raw(f"{discard}.raw", "1M", 1)
        qmp.run("blockdev-add", driver="raw", node_name=discard, discard=discard, file={"driver": "file", "filename": path, "discard": discard})
        address = export(case, qmp, discard, start=discard == "ignore")
        nbd.io(address, "discard 256k 256k", "write -z -u 512k 64k", "flush")
    qmp.run("quit")
    for discard in ("ignore", "unmap"):
        case.note(discard, [extent[:2] + extent[4:] for extent in case.images.map(f"{discard}.raw", form="raw")])


@scenario
def nbd_client(case):
    """The nbd driver against qemu-nbd: unix, errors, a size that is read."""
    path = case.images.raw("disk.raw", "2M", 6)
    socket = case.path("source.sock")
    case.spawn(["qemu-nbd", "--persistent", "--shared=8", "-f", "raw", "-x", "data", "-D", "text", "-k", socket, path])
    qmp = case.daemon().qmp
    qmp.poll(lambda: nbd.reachable(nbd.uri(socket, "data")), "qemu-nbd")
    server = {"type": "unix", "path": socket}
    qmp.run("blockdev-add", driver="nbd", node_name="far", server=server, export="data")
    show(qmp)
    nbd.io(export(case, qmp, "far"), "read -P 6 0 2M", "write -P 7 1M 64k", "read -P 7 1M 64k", "write -z 1536k 64k", "discard 0 64k", "flush")
    qmp.run("block-export-del", id="export-far", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-far")
    qmp.run("blockdev-del", node_name="far")
    qmp.run("blockdev-add", driver="nbd", node_name="far", server=server, export="data", read_only=True, reconnect_delay=1, open_timeout=0)
    show(qmp)
    qmp.refuse("blockdev-add", driver="nbd", node_name="n", server=server, export="other")
    qmp.refuse("blockdev-add", driver="nbd", node_name="n", server={"type": "unix", "path": case.path("nowhere.sock")})
    qmp.refuse("blockdev-add", driver="nbd", node_name="n", server={"type": "inet", "host": "127.0.0.1", "port": "1"})
    qmp.refuse("blockdev-add", driver="nbd", node_name="n", server={"type": "inet", "host": "127.0.0.1"})
    qmp.refuse("blockdev-add", driver="nbd", node_name="n")
    qmp.refuse("blockdev-add", driver="nbd", node_name="n", server=server, export="data", tls_creds="nothing")
    qmp.run("quit")


@scenario
def stream_from_nbd(case):
    """A stream from an NBD server into a local overlay."""
    path = case.images.raw("disk.raw", "2M", 6)
    case.images.write(path, "write -P 9 700k 300k", form="raw")
    case.images.qcow2("top.qcow2", "2M")
    socket = case.path("source.sock")
    case.spawn(["qemu-nbd", "--persistent", "--shared=8", "-r", "-f", "raw", "-k", socket, path])
    qmp = case.daemon().qmp
    qmp.poll(lambda: nbd.reachable(nbd.uri(socket)), "qemu-nbd")
    qmp.run("blockdev-add", driver="nbd", node_name="far", server={"type": "unix", "path": socket}, read_only=True)
    qmp.run("blockdev-add", driver="file", node_name="top-file", filename=case.path("top.qcow2"))
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file="top-file", backing="far")
    qmp.run("block-stream", job_id="job", device="top")
    qmp.wait("BLOCK_JOB_COMPLETED", device="job")
    qmp.wait_status("job", "null")
    show(qmp)
    qmp.run("blockdev-del", node_name="far")
    qmp.run("quit")
    case.images.same("top.qcow2", "disk.raw")
    case.images.check("top.qcow2")


@scenario
def reopen_file_in_use(case):
    """blockdev-reopen of the file under an image that a client makes larger, then of the image: every byte is where it was."""
    case.images.qcow2("disk.qcow2", "64M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="file", filename=case.path("disk.qcow2"))
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file="file")
    address = export(case, qmp, "disk")
    nbd.io(address, "write -P 1 0 4M")
    for on in (True, False):
        file = {"driver": "file", "node-name": "file", "filename": case.path("disk.qcow2"), "cache": {"no-flush": on}}
        qmp.run("blockdev-reopen", options=[file])
        nbd.io(address, f"write -P {2 + on} {8 + 16 * on}M 8M")
        qmp.run("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "disk", "file": "file", "cache": {"no-flush": on}}])
        nbd.io(address, "read -P 1 0 4M", f"read -P {2 + on} {8 + 16 * on}M 8M", "read -P 3 24M 8M")
    qmp.run("quit")
    case.images.check("disk.qcow2")


@scenario
def reopen(case):
    """blockdev-reopen: read-only there and back, another backing, what can't be changed."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)

    def options(**more):
        return [{"driver": "qcow2", "node-name": "top", "file": "top-file", "backing": "mid", **more}]

    qmp.run("blockdev-reopen", options=options(**{"read-only": True}))
    show(qmp)
    qmp.run("blockdev-reopen", options=options(**{"read-only": False, "discard": "unmap", "detect-zeroes": "unmap"}))
    show(qmp)
    qmp.run("blockdev-reopen", options=options(backing="base"))
    show(qmp)
    qmp.run("blockdev-reopen", options=options(backing=None))
    show(qmp)
    qmp.run("blockdev-reopen", options=options(backing="mid"))
    qmp.refuse("blockdev-reopen", options=options(backing="missing"))
    qmp.refuse("blockdev-reopen", options=options(backing="top"))
    qmp.refuse("blockdev-reopen", options=options(driver="raw"))
    qmp.refuse("blockdev-reopen", options=options(**{"node-name": "nowhere"}))
    qmp.refuse("blockdev-reopen", options=[{"driver": "qcow2", "file": "top-file"}])
    qmp.refuse("blockdev-reopen", options=options(nonsense=1))
    qmp.refuse("blockdev-reopen", options=options(**{"detect-zeroes": "maybe"}))
    qmp.refuse("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "top", "file": "top-file"}, {"driver": "qcow2", "node-name": "mid", "file": "missing"}])
    qmp.refuse("blockdev-reopen", options=[{"driver": "file", "node-name": "top-file", "filename": chain.file("mid")}])
    qmp.refuse("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "top", "file": "top-file"}])
    show(qmp)
    export(case, qmp, "top")
    qmp.refuse("blockdev-reopen", options=options(**{"read-only": True}))
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def resize(case):
    """block_resize of raw and qcow2."""
    case.images.qcow2("disk.qcow2", "1M", writes=["write -P 1 0 1M"])
    path = case.images.raw("disk.raw", "1M", 2)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="q", file={"driver": "file", "filename": case.path("disk.qcow2")})
    qmp.run("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": path})
    for node in ("q", "r"):
        qmp.run("block_resize", node_name=node, size=3 << 20)
        qmp.run("block_resize", node_name=node, size=2 << 20)
        qmp.refuse("block_resize", node_name=node, size=-1)
        qmp.refuse("block_resize", node_name=node, size=2**62)
        qmp.attempt("block_resize", node_name=node, size=1000)
        qmp.run("block_resize", node_name=node, size=2 << 20)
    qmp.refuse("block_resize", node_name="nowhere", size=1)
    qmp.refuse("block_resize", size=1)
    qmp.refuse("block_resize", device="q", node_name="q", size=1)
    qmp.refuse("block_resize", node_name="q")
    show(qmp)
    qmp.run("quit")
    check(case.images.info("disk.qcow2")["virtual-size"] == 2 << 20, "the size of the qcow2 image")
    check(case.images.size("disk.raw") == 2 << 20, "the size of the raw image")
    case.images.check("disk.qcow2")


@scenario
def write_threshold(case):
    """block-set-write-threshold and its event, which comes once."""
    path = case.images.raw("disk.raw", "2M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="file", filename=path)
    qmp.run("blockdev-add", driver="raw", node_name="disk", file="file")
    qmp.run("block-set-write-threshold", node_name="disk", write_threshold=1 << 20)
    show(qmp)
    client = nbd.Client(case, export(case, qmp, "disk"))
    client.do("write 0 1M")
    qmp.run("query-block-jobs")
    check(not qmp.seen("BLOCK_WRITE_THRESHOLD"), "the event came too early")
    client.do("write 1088k 64k")
    event = qmp.wait("BLOCK_WRITE_THRESHOLD")
    check(event["write-threshold"] == 1 << 20, f"{event}")
    client.do("write 1536k 64k")
    show(qmp)
    qmp.run("block-set-write-threshold", node_name="disk", write_threshold=1 << 20)
    qmp.run("block-set-write-threshold", node_name="disk", write_threshold=0)
    client.do("write 1536k 64k")
    client.close()
    qmp.refuse("block-set-write-threshold", node_name="nowhere", write_threshold=1)


@scenario
def set_active(case):
    """blockdev-set-active: an inactive node isn't written, and comes back."""
    case.images.qcow2("disk.qcow2", "1M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file={"driver": "file", "node-name": "file", "filename": case.path("disk.qcow2")})
    qmp.attempt("blockdev-set-active", node_name="disk", active=False)
    show(qmp)
    qmp.attempt("blockdev-set-active", node_name="file", active=False)
    qmp.attempt("block-stream", job_id="job", device="disk")
    qmp.attempt("blockdev-set-active", node_name="disk", active=True)
    qmp.attempt("blockdev-set-active", active=False)
    qmp.attempt("blockdev-set-active", active=True)
    qmp.refuse("blockdev-set-active", node_name="nowhere", active=True)
    show(qmp)


@scenario
def names(case):
    """What nodes are called: by a name that opens them as they are, or by their options."""
    case.images.chain("base", "top")
    raw = case.images.raw("disk.raw", "1M", 1)
    disk = {"driver": "file", "filename": raw}
    qmp = case.daemon("--object", "throttle-group,id=group").qmp
    qmp.run("blockdev-add", driver="throttle", node_name="throttle", throttle_group="group", file={"driver": "raw", "offset": 512, "size": 512, "file": disk})
    qmp.run("blockdev-add", driver="raw", node_name="null", file={"driver": "null-co", "size": 1 << 20})
    qmp.run("blockdev-add", driver="raw", node_name="debug", file={"driver": "blkdebug", "image": disk})
    qmp.run("blockdev-add", driver="blkdebug", node_name="aligned", image=disk, align=512)
    qmp.run("blockdev-add", driver="blkverify", node_name="verify", test=disk, raw=disk)
    qmp.run("blockdev-add", driver="raw", node_name="raw", read_only=True, cache={"direct": True}, file={**disk, "locking": "off"})
    top = {"driver": "qcow2", "node_name": "top", "file": {"driver": "file", "filename": case.path("top.qcow2")}}
    for backing in ("null", None, {"driver": "qcow2", "file": {"driver": "file", "filename": case.path("base.qcow2")}}):
        qmp.run("blockdev-add", **top, backing=backing)
        show(qmp)
        qmp.run("blockdev-del", node_name="top")
    qmp.run("blockdev-add", **top)
    for name in ("elsewhere.qcow2", f"file:{case.path('base.qcow2')}", case.path("base.qcow2")):
        qmp.run("change-backing-file", device="top", image_node_name="top", backing_file=name)
        qmp.run("query-named-block-nodes")
    qmp.run("change-backing-file", device="top", image_node_name="top", backing_file=f"file:{case.path('base.qcow2')}")
    qmp.run("blockdev-del", node_name="top")
    qmp.run("blockdev-add", **top)
    qmp.run("query-named-block-nodes")


@scenario
def names_in_headers(case):
    """A base that no file name describes is named by its options: as the base of a stream and of a commit, and in the header of what stands on it."""
    chain = case.images.chain("base", "low", "mid", "top")
    qmp = case.daemon().qmp
    base = {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": chain.file("base")}, "backing": {"driver": "null-co", "size": 4 << 20}}
    for name in ("low", "mid", "top"):
        base = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": chain.file(name)}, "backing": base}
    qmp.run("blockdev-add", **base)
    nodes = {node["node-name"]: node["file"] for node in qmp.quiet("query-named-block-nodes", flat=True)}
    qmp.refuse("block-stream", job_id="job", device="top", base=chain.file("base"))
    qmp.run("block-stream", job_id="job", device="top", base=nodes["low"])
    qmp.wait("BLOCK_JOB_COMPLETED", device="job")
    qmp.run("block-commit", job_id="job", device="top", top=nodes["low"], base=nodes["base"])
    qmp.wait("BLOCK_JOB_COMPLETED", device="job")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.note("header", json.loads(case.images.backing("top.qcow2")[0].removeprefix("json:")))


@scenario
def image_on_raw(case):
    """A qcow2 image whose file is a raw node grows as it would without; also after that was put in between."""
    path = case.images.qcow2("disk.qcow2", "4M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="file", filename=path)
    qmp.run("blockdev-add", driver="raw", node_name="raw", file="file")
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file="raw")
    address = export(case, qmp, "disk")
    nbd.io(address, "write -P 5 0 1M", "read -P 5 0 1M")
    qmp.run("block-export-del", id="export-disk")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-disk")
    qmp.run("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "disk", "file": "file"}])
    qmp.run("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "disk", "file": "raw"}])
    export(case, qmp, "disk", start=False)
    nbd.io(address, "write -P 6 1M 2M", "read -P 5 0 1M", "read -P 6 1M 2M")
    qmp.run("quit")
    case.images.check("disk.qcow2")
