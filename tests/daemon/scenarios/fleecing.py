"""copy-before-write and snapshot-access: what a disk held is read while guests change it."""

from drive import check, nbd, scenario
from drive.images import Failed, tool
from drive.jobs import debug, export, finish

from .backup import copy


def disk(case):
    """A daemon with a disk of one image: the reference forgets what the backing holds when it is asked for the status of what is shown."""
    chain = case.images.chain("disk")
    qmp = case.daemon().qmp
    chain.add(qmp)
    return chain, qmp


def fleece(case, **options):
    """A disk under a copy-before-write filter, and a node that shows what it held; gives the chain, the monitor, and the addresses of both."""
    rules = options.pop("file", None)
    chain, qmp = disk(case)
    copy(case, qmp, "saved", file=rules)
    qmp.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="saved", **options)
    qmp.run("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
    now = export(case, qmp, "cbw")
    then = export(case, qmp, "then", start=False, writable=False)
    return chain, qmp, now, then


CHANGES = ("write -P 50 3M 64k", "write -P 51 2000000 1000", "write -z 700k 200k", "discard 1M 512k", "write -P 52 0 4k", "flush")


def same(address, expected):
    """Fails unless an export reads as it should."""
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", address, expected)


@scenario
def reads_the_moment(case):
    """Through an export, before and after it was changed; the disk itself has the changes."""
    chain, qmp, now, then = fleece(case)
    same(then, chain.expected)
    nbd.io(now, *CHANGES)
    same(then, chain.expected)
    nbd.io(now, "read -P 50 3M 64k", "read -P 51 2000000 1000", "read -P 0 700k 200k", "read -P 52 0 4k")
    nbd.io(now, "write -P 60 0 4M")
    same(then, chain.expected)
    qmp.run("query-block-exports")
    qmp.run("block-export-del", id="export-then")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-then")
    qmp.refuse("blockdev-del", node_name="cbw")
    qmp.refuse("blockdev-del", node_name="saved")
    qmp.run("blockdev-del", node_name="then")
    qmp.refuse("blockdev-del", node_name="cbw")
    qmp.run("block-export-del", id="export-cbw")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-cbw")
    qmp.run("blockdev-del", node_name="cbw")
    qmp.run("blockdev-del", node_name="saved")
    qmp.run("quit")
    case.images.check("disk.qcow2")
    case.images.check("saved.qcow2")
    case.images.write(case.path("disk.qcow2"), "read -P 60 0 4M")


@scenario
def backup_of_it(case):
    """A backup of what is shown, while a client changes the disk."""
    chain, qmp, now, _then = fleece(case)
    nbd.io(now, *CHANGES)
    copy(case, qmp, "copy")
    qmp.run("blockdev-backup", job_id="job", device="then", target="copy", sync="full", speed=1 << 20)
    nbd.io(now, "write -P 53 1M 64k", "write -P 54 3500k 64k")
    qmp.run("block-job-set-speed", device="job", speed=0)
    finish(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def refuses_the_write(case):
    """What can't be saved isn't changed: the client is refused once, and the next time it works."""
    rule = debug("saved-file", iotype="write", errno=28, once=True)
    chain, _qmp, now, then = fleece(case, file=rule)
    case.note("refused", "No space left" in nbd.io_fails(now, "write -P 50 0 64k"))
    nbd.io(now, "read -P 1 0 64k", "write -P 50 0 64k", "read -P 50 0 64k")
    same(then, chain.expected)


@scenario
def breaks_the_snapshot(case):
    """The client comes first; what was kept is lost, and whoever reads it is told."""
    rule = debug("saved-file", iotype="write", errno=28, once=True)
    _chain, _qmp, now, then = fleece(case, file=rule, on_cbw_error="break-snapshot")
    nbd.io(then, "read -P 1 0 64k", read_only=True)
    nbd.io(now, "write -P 50 0 64k", "read -P 50 0 64k", "write -P 51 1M 64k", "write -P 52 0 64k")
    case.note("lost", bool(nbd.io_fails(then, "read -P 1 0 64k", read_only=True)))
    case.note("all of it", bool(nbd.io_fails(then, "read 2M 64k", read_only=True)))


@scenario
def slow_target(case):
    """A target that is too slow breaks what is kept, and the client goes on."""
    chain, qmp = disk(case)
    copy(case, qmp, "saved")
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={"bps-total": 65536})
    qmp.run("blockdev-add", driver="throttle", node_name="slow", throttle_group="group", file="saved")
    more = {"on-cbw-error": "break-snapshot", "cbw-timeout": 1}
    qmp.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="slow", **more)
    qmp.run("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
    now, then = export(case, qmp, "cbw"), export(case, qmp, "then", start=False, writable=False)
    nbd.io(now, "write -P 50 0 512k", "write -P 50 512k 512k", "read -P 50 0 1M")
    case.note("lost", bool(nbd.io_fails(then, "read 2M 64k", read_only=True)))
    qmp.run("qom-set", path="/objects/group", property="limits", value={"bps-total": 0})
    qmp.run("quit")
    chain.guest_wrote("write -P 50 0 1M")
    chain.reads_as_before()


def scratch(case):
    """The older way: an overlay of the disk itself, into which a backup job saves; gives the chain, the monitor, and the addresses of both."""
    chain = case.images.chain("base", "disk")
    qmp = case.daemon().qmp
    chain.add(qmp)
    now = export(case, qmp, "disk")
    case.images.qcow2("scratch.qcow2", "4M", "disk.qcow2")
    qmp.run("blockdev-add", driver="qcow2", node_name="scratch", backing="disk", file={"driver": "file", "filename": case.path("scratch.qcow2")})
    backup = {"type": "blockdev-backup", "data": {"job-id": "job", "device": "disk", "target": "scratch", "sync": "none"}}
    qmp.run("transaction", actions=[backup])
    then = export(case, qmp, "scratch", start=False, writable=False)
    return chain, qmp, now, then


@scenario
def own_overlay(case):
    """The overlay shows the moment for as long as the job runs: how libvirt lets a backup be pulled."""
    chain, qmp, now, then = scratch(case)
    same(then, chain.expected)
    nbd.io(now, *CHANGES)
    same(then, chain.expected)
    nbd.io(now, "read -P 50 3M 64k", "read -P 51 2000000 1000", "read -P 0 700k 200k", "read -P 52 0 4k", "write -P 60 0 4M")
    same(then, chain.expected)
    qmp.refuse("blockdev-del", node_name="scratch")
    qmp.run("block-export-del", id="export-scratch")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-scratch")
    qmp.refuse("blockdev-del", node_name="scratch")
    qmp.run("job-cancel", id="job")
    qmp.wait_status("job", "null")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("blockdev-del", node_name="scratch")
    qmp.run("quit")
    case.images.check("disk.qcow2")
    case.images.check("scratch.qcow2")
    case.images.write(case.path("disk.qcow2"), "read -P 60 0 4M")


@scenario
def own_overlay_outlives(case):
    """The job ends while the overlay is still exported: what it showed is gone."""
    chain, qmp, now, then = scratch(case)
    nbd.io(now, *CHANGES)
    same(then, chain.expected)
    qmp.run("job-cancel", id="job")
    qmp.wait_status("job", "null")
    nbd.io(now, "write -P 70 2M 64k")
    try:
        nbd.io(then, "read 2M 64k", read_only=True)
        case.note("is shown", True)
    except Failed:
        case.note("is shown", False)
    qmp.run("block-export-del", id="export-scratch")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-scratch")
    qmp.run("blockdev-del", node_name="scratch")
    qmp.run("quit")
    case.images.check("disk.qcow2")


@scenario
def arguments(case):
    """What doesn't go together."""
    _chain, qmp = disk(case)
    copy(case, qmp, "saved")
    copy(case, qmp, "small", "2M")

    def refuse(**more):
        qmp.refuse("blockdev-add", **{"driver": "copy-before-write", "node_name": "cbw", "file": "disk", "target": "saved", **more})

    qmp.refuse("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk")
    qmp.refuse("blockdev-add", driver="copy-before-write", node_name="cbw", target="saved")
    refuse(target="nowhere")
    refuse(file="nowhere")
    if qmp.attempt("blockdev-add", driver="copy-before-write", node_name="odd", file="disk", target="small"):
        qmp.run("blockdev-del", node_name="odd")
    refuse(on_cbw_error="nonsense")
    refuse(cbw_timeout=-1)
    refuse(bitmap={"node": "disk", "name": "b"})
    refuse(min_cluster_size=1000)
    qmp.refuse("blockdev-add", driver="snapshot-access", node_name="then")
    qmp.refuse("blockdev-add", driver="snapshot-access", node_name="then", file="nowhere")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="saved", min_cluster_size=131072, cbw_timeout=5)
    qmp.run("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.refuse("block_resize", node_name="disk", size=8 << 20)


@scenario
def what_was_copied_is_given_back(case):
    """A backup of what is shown that discards it on the way: the copy is whole, and nothing is kept twice."""
    chain, qmp = disk(case)
    path = case.images.qcow2("saved.qcow2")
    qmp.run("blockdev-add", driver="qcow2", node_name="saved", discard="unmap", file={"driver": "file", "filename": path, "discard": "unmap"})
    qmp.run("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="saved")
    qmp.run("blockdev-add", driver="snapshot-access", node_name="then", file="cbw", discard="unmap")
    now = export(case, qmp, "cbw")
    nbd.io(now, *CHANGES)
    copy(case, qmp, "copy")
    qmp.run("blockdev-backup", job_id="job", device="then", target="copy", sync="full", discard_source=True)
    finish(qmp)
    # What is shown is there no more.
    then = export(case, qmp, "then", start=False, writable=False)
    nbd.io_fails(then, "read 0 64k", read_only=True)
    nbd.io(now, "write -P 61 0 4M")
    qmp.run("block-export-del", id="export-then")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-then")
    for name in ("then", "copy"):
        qmp.run("blockdev-del", node_name=name)
    case.images.same("copy.qcow2", chain.expected)
    qmp.run("block-export-del", id="export-cbw")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-cbw")
    qmp.run("blockdev-del", node_name="cbw")
    qmp.run("blockdev-del", node_name="saved")
    qmp.run("quit")
    case.images.check("saved.qcow2")
    case.images.check("copy.qcow2")
    held = sum(length for _start, length, *_rest, data in case.images.map("saved.qcow2") if data)
    check(held == 0, f"{held} bytes are kept")


@scenario
def what_was_copied_is_kept(case):
    """The same where the node ignores discards, which it does if nothing is said: everything can be read as before."""
    chain, qmp, now, then = fleece(case)
    nbd.io(now, *CHANGES)
    copy(case, qmp, "copy")
    qmp.run("blockdev-backup", job_id="job", device="then", target="copy", sync="full", discard_source=True)
    finish(qmp)
    same(then, chain.expected)
    nbd.io(now, "write -P 61 0 4M")
    same(then, chain.expected)
