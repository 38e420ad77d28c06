"""Snapshots, transactions, what follows them, and images made by the daemon."""

import json
import os
import subprocess

from drive import check, nbd, scenario
from drive.images import tool
from drive.jobs import debug, export, finish


def disk(case, size="4M"):
    """A daemon with one qcow2 disk; gives its monitor."""
    case.images.qcow2("disk.qcow2", size, writes=["write -P 1 0 1M"])
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file={"driver": "file", "node-name": "disk-file", "filename": case.path("disk.qcow2")})
    return qmp


def overlay(case, qmp, name, size="4M", backing=None):
    """An empty image opened without its backing, as a snapshot wants it."""
    case.images.qcow2(f"{name}.qcow2", size, backing)
    qmp.run("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": case.path(f"{name}.qcow2")}, backing=None)


@scenario
def snapshot(case):
    """blockdev-snapshot under a client; the client's writes go to the overlay; then streamed back together."""
    qmp = disk(case)
    client = nbd.Client(case, export(case, qmp, "disk"))
    client.do("write -P 2 512k 64k")
    overlay(case, qmp, "over")
    qmp.run("blockdev-snapshot", node="disk", overlay="over")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("query-block-exports")
    client.do("read -P 2 512k 64k")
    client.do("write -P 3 2M 64k")
    client.do("flush")
    qmp.run("block-stream", job_id="job", device="over")
    finish(qmp)
    client.do("read -P 3 2M 64k")
    client.do("read -P 1 0 512k")
    client.close()
    qmp.run("blockdev-del", node_name="disk")
    qmp.run("quit")
    case.images.write(case.path("over.qcow2"), "read -P 3 2M 64k", "read -P 2 512k 64k")
    case.images.write(case.path("disk.qcow2"), "read -P 0 2M 64k", "read -P 2 512k 64k")
    check(case.images.backing("over.qcow2")[0] is None, "the backing link")


@scenario
def snapshot_and_commit(case):
    """A snapshot, then its overlay is committed back."""
    qmp = disk(case)
    client = nbd.Client(case, export(case, qmp, "disk"))
    overlay(case, qmp, "over")
    qmp.run("blockdev-snapshot", node="disk", overlay="over")
    client.do("write -P 3 2M 64k")
    qmp.run("block-commit", job_id="job", device="over")
    qmp.wait("BLOCK_JOB_READY", device="job")
    client.do("write -P 4 3M 64k")
    qmp.run("job-complete", id="job")
    finish(qmp)
    client.do("read -P 3 2M 64k")
    client.do("write -P 5 1M 64k")
    client.close()
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("query-block-exports")
    qmp.run("blockdev-del", node_name="over")
    qmp.run("quit")
    case.images.write(case.path("disk.qcow2"), "read -P 3 2M 64k", "read -P 4 3M 64k", "read -P 5 1M 64k", "read -P 1 0 1M")
    case.images.check("disk.qcow2")


@scenario
def snapshot_refused(case):
    """Snapshots that can't be."""
    qmp = disk(case)
    overlay(case, qmp, "over")
    case.images.qcow2("based.qcow2", None, "disk.qcow2")
    case.images.raw("flat.raw", "4M")
    qmp.run("blockdev-add", driver="raw", node_name="flat", file={"driver": "file", "filename": case.path("flat.raw")})
    qmp.refuse("blockdev-snapshot", node="nowhere", overlay="over")
    qmp.refuse("blockdev-snapshot", node="disk", overlay="nowhere")
    qmp.refuse("blockdev-snapshot", node="disk", overlay="disk")
    qmp.refuse("blockdev-snapshot", node="disk", overlay="flat")
    qmp.refuse("blockdev-snapshot", node="disk")
    qmp.run("blockdev-snapshot", node="disk", overlay="over")
    qmp.refuse("blockdev-snapshot", node="disk", overlay="over")
    overlay(case, qmp, "other")
    qmp.refuse("blockdev-snapshot", node="other", overlay="over")
    address = export(case, qmp, "other")
    client = nbd.Client(case, address)
    qmp.refuse("blockdev-snapshot", node="over", overlay="other")
    client.close()
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def snapshot_sync(case):
    """blockdev-snapshot-sync makes the overlay itself."""
    qmp = disk(case)
    client = nbd.Client(case, export(case, qmp, "disk"))
    qmp.run("blockdev-snapshot-sync", node_name="disk", snapshot_file=case.path("over.qcow2"), snapshot_node_name="over")
    qmp.run("query-named-block-nodes", flat=True)
    client.do("write -P 3 2M 64k")
    client.do("read -P 1 0 1M")
    client.close()
    qmp.run("block-stream", job_id="job", device="over")
    finish(qmp)
    qmp.run("quit")
    case.note("info", {key: case.images.info("over.qcow2").get(key) for key in ("virtual-size", "cluster-size", "backing-filename", "format-specific")})
    case.images.write(case.path("over.qcow2"), "read -P 3 2M 64k", "read -P 1 0 1M")


@scenario
def snapshot_sync_existing(case):
    """mode=existing takes an image that is there."""
    qmp = disk(case)
    case.images.qcow2("over.qcow2", None, "disk.qcow2")
    over = {"node_name": "disk", "snapshot_file": case.path("over.qcow2"), "snapshot_node_name": "over"}
    qmp.run("blockdev-snapshot-sync", **over, mode="existing", format="qcow2")
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def snapshot_sync_refused(case):
    """What blockdev-snapshot-sync refuses."""
    qmp = disk(case)
    file = case.path("over.qcow2")
    qmp.refuse("blockdev-snapshot-sync", node_name="nowhere", snapshot_file=file, snapshot_node_name="over")
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_file=file)
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_node_name="over")
    qmp.refuse("blockdev-snapshot-sync", snapshot_file=file, snapshot_node_name="over")
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_file=case.path("no/where"), snapshot_node_name="over")
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_file=file, snapshot_node_name="disk")
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_file=file, snapshot_node_name="over", format="nonsense")
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_file=file, snapshot_node_name="over", format="raw")
    qmp.refuse("blockdev-snapshot-sync", node_name="disk", snapshot_file=case.path("none"), snapshot_node_name="over", mode="existing")
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def transaction(case):
    """Two snapshots at once."""
    qmp = disk(case)
    case.images.qcow2("second.qcow2", "1M", writes=["write -P 9 0 1M"])
    qmp.run("blockdev-add", driver="qcow2", node_name="second", file={"driver": "file", "filename": case.path("second.qcow2")})
    overlay(case, qmp, "over")
    overlay(case, qmp, "over2", "1M")
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": "disk", "overlay": "over"}},
        {"type": "blockdev-snapshot", "data": {"node": "second", "overlay": "over2"}},
    ]
    qmp.run("transaction", actions=actions)
    qmp.run("query-named-block-nodes", flat=True)
    nbd.io(export(case, qmp, "over"), "read -P 1 0 1M", "write -P 4 0 64k")
    nbd.io(export(case, qmp, "over2", start=False), "read -P 9 0 1M", "write -P 4 0 64k")
    qmp.run("quit")
    case.images.write(case.path("second.qcow2"), "read -P 9 0 1M")


@scenario
def transaction_fails(case):
    """When the second action can't be, the first isn't."""
    qmp = disk(case)
    overlay(case, qmp, "over")
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": "disk", "overlay": "over"}},
        {"type": "blockdev-snapshot", "data": {"node": "nowhere", "overlay": "over"}},
    ]
    client = nbd.Client(case, export(case, qmp, "disk"))
    qmp.refuse("transaction", actions=actions)
    qmp.refuse("transaction", actions=[actions[0], {"type": "abort", "data": {}}])
    qmp.refuse("transaction", actions=[actions[0], {"type": "nonsense", "data": {}}])
    qmp.refuse("transaction", actions=[actions[0], {"type": "blockdev-snapshot"}])
    qmp.refuse("transaction", actions=[actions[0], actions[0]])
    qmp.refuse("transaction")
    qmp.run("transaction", actions=[])
    qmp.run("query-named-block-nodes", flat=True)
    client.do("write -P 5 3M 64k")
    client.close()
    qmp.run("blockdev-del", node_name="over")
    qmp.run("quit")
    case.images.write(case.path("disk.qcow2"), "read -P 5 3M 64k", "read -P 1 0 1M")


@scenario
def transaction_sync(case):
    """blockdev-snapshot-sync in a transaction, which may leave its file behind when it fails, but nothing else."""
    qmp = disk(case)
    sync = {"type": "blockdev-snapshot-sync", "data": {"node-name": "disk", "snapshot-file": case.path("over.qcow2"), "snapshot-node-name": "over"}}
    qmp.refuse("transaction", actions=[sync, {"type": "abort", "data": {}}])
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("transaction", actions=[sync])
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def change_backing_file(case):
    """What the header says is changed, what is open isn't."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("change-backing-file", device="top", image_node_name="top", backing_file="mid.qcow2")
    qmp.run("change-backing-file", device="top", image_node_name="mid", backing_file="base.qcow2")
    qmp.refuse("change-backing-file", device="top", image_node_name="base", backing_file="x")
    qmp.refuse("change-backing-file", device="top", image_node_name="nowhere", backing_file="x")
    qmp.refuse("change-backing-file", device="nowhere", image_node_name="top", backing_file="x")
    qmp.refuse("change-backing-file", device="mid", image_node_name="top", backing_file="x")
    qmp.refuse("change-backing-file", device="top", image_node_name="top")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    check(case.images.backing("top.qcow2") == ("mid.qcow2", "qcow2"), f"{case.images.backing('top.qcow2')}")
    check(case.images.backing("mid.qcow2") == ("base.qcow2", "qcow2"), f"{case.images.backing('mid.qcow2')}")
    chain.reads_as_before()


def created(qmp, job="job"):
    """Waits for the end of a job that makes an image; gives its error."""
    qmp.wait_status(job, "concluded")
    qmp.run("query-jobs")
    error = next(found for found in qmp.quiet("query-jobs") if found["id"] == job).get("error")
    qmp.run("job-dismiss", id=job)
    qmp.wait_status(job, "null")
    return error


@scenario
def create(case):
    """blockdev-create of a file and of a qcow2 image in it, then its use."""
    qmp = case.daemon().qmp
    qmp.run("blockdev-create", job_id="job", options={"driver": "file", "filename": case.path("new.qcow2"), "size": 0})
    check(created(qmp) is None, "creating the file failed")
    qmp.run("blockdev-add", driver="file", node_name="file", filename=case.path("new.qcow2"))
    qmp.run("blockdev-create", job_id="job", options={"driver": "qcow2", "file": "file", "size": 2 << 20})
    check(created(qmp) is None, "creating the image failed")
    qmp.run("blockdev-add", driver="qcow2", node_name="image", file="file")
    qmp.run("query-named-block-nodes", flat=True)
    nbd.io(export(case, qmp, "image"), "write -P 3 1M 64k", "read -P 3 1M 64k")
    qmp.run("quit")
    case.images.check("new.qcow2")
    case.note("info", {key: case.images.info("new.qcow2").get(key) for key in ("virtual-size", "cluster-size", "format-specific")})


@scenario
def create_variants(case):
    """blockdev-create with options."""
    case.images.qcow2("base.qcow2", "1M")
    qmp = case.daemon().qmp
    qmp.run("blockdev-create", job_id="raw", options={"driver": "file", "filename": case.path("a.raw"), "size": 1 << 20, "preallocation": "falloc"})
    case.note("raw", created(qmp, "raw"))
    check(case.images.size("a.raw") == 1 << 20, "the size of the raw file")
    variants = [
        {"version": "v2"},
        {"cluster-size": 4096, "refcount-bits": 8, "lazy-refcounts": True},
        {"backing-file": case.path("base.qcow2"), "backing-fmt": "qcow2"},
        {"preallocation": "metadata"},
        {"preallocation": "falloc", "cluster-size": 4096},
        {"preallocation": "full", "version": "v2"},
        {"preallocation": "metadata", "backing-file": case.path("base.qcow2"), "backing-fmt": "qcow2"},
        {"preallocation": "falloc", "extended-l2": True, "backing-file": case.path("base.qcow2"), "backing-fmt": "qcow2"},
        {"extended-l2": True},
        {"extended-l2": True, "version": "v2"},
        {"extended-l2": True, "cluster-size": 4096},
        {"compression-type": "zstd", "version": "v2"},
        {"data-file-raw": True},
        {"size": 1 << 63},
        {"size": (1 << 63) - 512},
        {"size": 1 << 40, "cluster-size": 512},
        {"compression-type": "zstd"},
        {"cluster-size": 1000},
        {"cluster-size": 4 << 20},
        {"version": "v2", "lazy-refcounts": True},
        {"version": "v2", "refcount-bits": 8},
        {"refcount-bits": 3},
        {"backing-fmt": "qcow2"},
        {"size": 1000},
    ]
    for number, more in enumerate(variants):
        # Each in a file of its own: the reference doesn't cut what is longer, and allocates nothing then.
        image = f"b{number}"
        case.images.raw(image, "0")
        qmp.run("blockdev-add", driver="file", node_name="file", filename=case.path(image))
        qmp.run("blockdev-create", job_id="job", options={"driver": "qcow2", "file": "file", "size": 1 << 20, **more})
        made = created(qmp) is None
        qmp.run("blockdev-del", node_name="file")
        if made:
            info = nbd.tool("qemu-img", "info", "-U", "--output=json", case.path(image))
            check('"qcow2"' in info, f"not a qcow2 image: {info}")
            keys = ("virtual-size", "cluster-size", "format-specific", "backing-filename", "backing-filename-format")
            case.note(str(number), {key: case.images.info(image).get(key) for key in keys})
            case.images.check(image)
            # What is allocated, and where data are: not how the file is laid out.
            case.note(f"map {number}", [extent[:6] for extent in case.images.map(image)])
    qmp.run("quit")


@scenario
def amend(case):
    """x-blockdev-amend: of an image that isn't encrypted there is nothing to change."""
    qmp = disk(case)
    qmp.run("x-blockdev-amend", job_id="job", node_name="disk", options={"driver": "qcow2"})
    check(created(qmp) is None, "nothing to change")
    keys = {"format": "luks", "state": "active", "new-secret": "none"}
    qmp.run("x-blockdev-amend", job_id="job", node_name="disk", options={"driver": "qcow2", "encrypt": keys})
    check(created(qmp) is not None, "there are no keys")
    for node, options in (("nowhere", {"driver": "qcow2"}), ("disk", {"driver": "raw"}), ("disk-file", {"driver": "file"}), ("disk", {}), ("disk", {"driver": "qcow2", "lazy-refcounts": True})):
        qmp.refuse("x-blockdev-amend", job_id="job", node_name=node, options=options)


@scenario
def create_with_data_file(case):
    """blockdev-create of an image whose data are in another file, which may be one that holds a disk already."""
    raw = case.images.raw("data.raw", "1M", 5)
    qmp = case.daemon().qmp
    for name in ("meta", "new"):
        qmp.run("blockdev-create", job_id="job", options={"driver": "file", "filename": case.path(name), "size": 0})
        created(qmp)
        qmp.run("blockdev-add", driver="file", node_name=name, filename=case.path(name))
    options = {"driver": "qcow2", "file": "meta", "size": 1 << 20}
    qmp.run("blockdev-create", job_id="job", options={**options, "data-file": {"driver": "file", "filename": raw}, "data-file-raw": True})
    check(created(qmp) is None, "a raw data file")
    case.note("raw", case.images.info("meta")["format-specific"])
    case.images.same("meta", raw)
    for more in ({"data-file-raw": True, "backing-file": "x"}, {"version": "v2"}):
        qmp.run("blockdev-create", job_id="job", options={**options, "data-file": "new", **more})
        check(created(qmp) is not None, f"{more} is no such image")
    qmp.run("blockdev-create", job_id="job", options={**options, "data-file": "new"})
    check(created(qmp) is None, "a data file")
    qmp.run("blockdev-add", driver="qcow2", node_name="image", file="meta", data_file="new")
    qmp.run("query-named-block-nodes", flat=True)
    nbd.io(export(case, qmp, "image"), "write -P 6 64k 64k", "read -P 6 64k 64k", "read -P 0 0 64k")
    qmp.run("block-export-del", id="export-image")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-image")
    qmp.run("block_resize", node_name="image", size=2 << 20)
    qmp.run("quit")
    case.images.check("meta")
    check(case.images.size("new") == 2 << 20, f"the data file has {case.images.size('new')} bytes")


@scenario
def create_in_fixed_size(case):
    """blockdev-create in a node that can't change its size, and holds something else."""
    path = case.images.raw("disk.raw", "8M", 7)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="raw", node_name="window", size=4 << 20, file={"driver": "file", "filename": path})
    qmp.run("blockdev-create", job_id="job", options={"driver": "qcow2", "file": "window", "size": 16 << 20})
    check(created(qmp) is None, "creating the image failed")
    qmp.run("blockdev-add", driver="qcow2", node_name="image", file="window")
    address = export(case, qmp, "image")
    nbd.io(address, "read -P 0 0 16M", "write -P 8 1M 1M", "read -P 8 1M 1M")
    case.note("full", nbd.io_fails(address, "write -P 9 4M 4M").splitlines()[0])


@scenario
def create_refused(case):
    """blockdev-create with nonsense."""
    qmp = case.daemon().qmp
    qmp.refuse("blockdev-create", job_id="job")
    qmp.refuse("blockdev-create", job_id="job", options={"driver": "nonsense"})
    qmp.refuse("blockdev-create", job_id="job", options={"driver": "qcow2", "size": 1})
    qmp.refuse("blockdev-create", job_id="job", options={"driver": "null-co"})
    qmp.refuse("blockdev-create", job_id="0job", options={"driver": "file", "filename": case.path("x"), "size": 0})
    qmp.attempt("blockdev-create", job_id="job", options={"driver": "qcow2", "file": "missing", "size": 1 << 20})
    created(qmp)
    qmp.run("blockdev-create", job_id="job2", options={"driver": "file", "filename": case.path("no/where"), "size": 0})
    created(qmp, "job2")
    qmp.run("query-block-jobs")


@scenario
def mirror(case):
    """blockdev-mirror: into a target, ready, completed."""
    qmp = disk(case)
    overlay(case, qmp, "target")
    if qmp.attempt("blockdev-mirror", job_id="job", device="disk", target="target", sync="full"):
        qmp.wait("BLOCK_JOB_READY", device="job")
        qmp.run("job-complete", id="job")
        finish(qmp)
        qmp.run("quit")
        case.images.same("target.qcow2", "disk.qcow2", expected_form="qcow2")


@scenario
def mirror_through(case):
    """copy-mode write-blocking, from the beginning and by block-job-change; what a client has written is in the target when it is answered."""
    qmp = disk(case)
    overlay(case, qmp, "target")
    address = export(case, qmp, "disk")
    for number, begin in enumerate(("write-blocking", "background")):
        qmp.run("blockdev-mirror", job_id="job", device="disk", target="target", sync="full", copy_mode=begin)
        qmp.wait("BLOCK_JOB_READY", device="job")
        qmp.run("query-block-jobs")
        qmp.refuse("block-job-change", id="none", type="mirror", **{"copy-mode": "background"})
        qmp.attempt("block-job-change", id="job", type="mirror", **{"copy-mode": "background"})
        qmp.run("block-job-change", id="job", type="mirror", **{"copy-mode": "write-blocking"})
        qmp.refuse("block-job-change", id="job", type="mirror", **{"copy-mode": "background"})
        case.transcript.mask("len", "offset", "current-progress", "total-progress")
        nbd.io(address, f"write -P {20 + number} 1000 3000", "write -z 128k 64k", "discard 192k 64k", "flush")
        qmp.run("block-job-cancel", device="job")
        finish(qmp)
    qmp.run("quit")
    case.images.same("target.qcow2", "disk.qcow2", expected_form="qcow2")


@scenario
def mirror_arguments(case):
    """Arguments of blockdev-mirror that don't fit, and `replaces`: the node below a filter is exchanged."""
    qmp = disk(case)
    overlay(case, qmp, "target")
    overlay(case, qmp, "other")
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={})
    qmp.run("blockdev-add", driver="throttle", node_name="limited", throttle_group="group", file="disk")

    def refuse(**more):
        qmp.refuse("blockdev-mirror", **{"job_id": "job", "device": "limited", "target": "target", "sync": "full", **more})

    refuse(granularity=100)
    refuse(granularity=1 << 27)
    refuse(granularity=768)
    refuse(buf_size=-1)
    refuse(replaces="nowhere")
    refuse(replaces="other")
    refuse(sync="incremental")
    refuse(copy_mode="nonsense")
    address = export(case, qmp, "limited")
    qmp.run("blockdev-mirror", job_id="job", device="limited", target="target", sync="full", replaces="disk", buf_size=1, granularity=65536)
    qmp.wait("BLOCK_JOB_READY", device="job")
    nbd.io(address, "write -P 30 2M 64k")
    case.transcript.mask("len", "offset")
    qmp.run("block-job-complete", device="job")
    finish(qmp)
    nbd.io(address, "read -P 30 2M 64k", "write -P 31 3M 64k", "read -P 31 3M 64k")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.write(case.path("target.qcow2"), "read -P 30 2M 64k", "read -P 31 3M 64k", "read -P 1 0 1M")
    case.images.write(case.path("disk.qcow2"), "read -P 0 3M 64k")


@scenario
def mirror_policies(case):
    """An error of the target is met by on-target-error, one of the source by on-source-error."""
    qmp = disk(case)
    case.images.qcow2("target.qcow2", "4M")
    qmp.run("blockdev-add", driver="file", node_name="target-file", filename=case.path("target.qcow2"))
    qmp.run("blockdev-add", **debug("target-file", iotype="write", errno=28, sector=1024, once=True))
    qmp.run("blockdev-add", driver="qcow2", node_name="target", file="target-file-debug")
    case.transcript.mask("len", "offset", "busy")
    qmp.run("blockdev-mirror", job_id="job", device="disk", target="target", sync="full", on_source_error="report", on_target_error="enospc")
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    qmp.run("query-block-jobs")
    qmp.run("block-job-resume", device="job")
    qmp.wait("BLOCK_JOB_READY", device="job")
    qmp.run("block-job-complete", device="job")
    finish(qmp)
    qmp.run("quit")
    case.images.same("target.qcow2", "disk.qcow2", expected_form="qcow2")


@scenario
def bitmaps(case):
    """Dirty bitmaps."""
    qmp = disk(case)
    qmp.attempt("block-dirty-bitmap-add", node="disk", name="b")
    qmp.attempt("block-dirty-bitmap-add", node="nowhere", name="b")
    qmp.attempt("block-dirty-bitmap-clear", node="disk", name="b")
    qmp.attempt("block-dirty-bitmap-disable", node="disk", name="b")
    qmp.attempt("block-dirty-bitmap-remove", node="disk", name="b")
    qmp.attempt("block-dirty-bitmap-remove", node="disk", name="b")


@scenario
def changing_children(case):
    """x-blockdev-change, on a driver whose children don't change."""
    qmp = disk(case)
    for arguments in ({}, {"child": "file", "node": "disk"}, {"child": "nothing"}, {"child": "file"}, {"node": "nowhere"}, {"node": "disk"}):
        qmp.refuse("x-blockdev-change", parent="disk", **arguments)
    qmp.refuse("x-blockdev-change", parent="nowhere", node="disk")


# Writes blocks, sixteen at a time, until the file STOP is there; then flushes, and tells what it has written.
WRITER = """
import os
block = 0
while not os.path.exists("STOP") and block < 1024:
    while h.aio_in_flight() >= 16:
        h.poll(-1)
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([block % 250 + 1] * 65536)), block * 65536)
    block += 1
    if block == 48:
        print("begun", flush=True)
while h.aio_in_flight():
    h.poll(-1)
h.flush()
print(block, flush=True)
"""


@scenario
def flushed_after(case):
    """A client writes while a snapshot is taken of its disk, whose image stays open for writing because of a filter. What it flushes then is in the files."""
    qmp = case.daemon().qmp
    for at in range(4):
        name, over = f"disk{at}", case.path(f"over{at}.qcow2")
        disk = case.images.qcow2(f"{name}.qcow2", "64M")
        qmp.run("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": disk})
        qmp.run("blockdev-add", driver="copy-on-read", node_name=f"copies{at}", file=name)
        address = export(case, qmp, f"copies{at}", start=at == 0)
        script = WRITER.replace("STOP", case.path(f"stop{at}"))
        client = case.spawn(["/usr/bin/python3", "-m", "nbd", "--uri", address, "--command", script], stdout=subprocess.PIPE, text=True)
        client.stdout.readline()
        qmp.run("blockdev-snapshot-sync", node_name=f"copies{at}", snapshot_file=over, snapshot_node_name=f"over{at}")
        with open(case.path(f"stop{at}"), "wb"):
            written = int(client.stdout.readline())
        # What a daemon that is killed now would leave.
        layers = [case.images.duplicate(os.path.basename(path), f"copy-{os.path.basename(path)}") for path in (disk, over)]
        below, above = [{"driver": "qcow2", "file": {"driver": "file", "filename": path}} for path in layers]
        tool("qemu-img", "convert", "-O", "raw", f"json:{json.dumps({**above, 'backing': {**below, 'backing': None}})}", case.path("found.raw"))
        with open(case.path("found.raw"), "rb") as file:
            found = file.read()
        missing = [block for block in range(written) if found[block * 65536] != block % 250 + 1]
        check(not missing, f"of {written} blocks that were flushed {missing} are gone")
