"""drive-backup and drive-mirror: they make and open the target themselves."""

from drive import check, nbd, scenario
from drive.jobs import SLOW, export, finish, idle, let_go

from .backup import disk


def plain(case, size="4M"):
    """As `disk`, but the daemon opens the base by the disk's header, for reading only."""
    chain = case.images.chain("base", "disk", size=size)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file={"driver": "file", "filename": chain.file("disk")})
    return chain, qmp


def mirrored(case, qmp, *commands, address=None):
    """Waits until a mirror is ready, lets a client write, completes it."""
    qmp.wait("BLOCK_JOB_READY", device="job")
    case.transcript.mask("len", "offset", "busy", "current-progress", "total-progress")
    if commands:
        nbd.io(address, *commands)
    qmp.run("job-complete", id="job")
    finish(qmp)


def described(case, name, form="qcow2"):
    """What a new image is, as qemu-img sees it."""
    info = case.images.info(name, form)
    kept = ("virtual-size", "format", "backing-filename", "backing-filename-format", "cluster-size")
    case.note(name, {key: info.get(key) for key in kept})


@scenario
def backup(case):
    """A whole chain into a file that is made for it, in the source's format; a client writes meanwhile."""
    chain, qmp = disk(case)
    address = export(case, qmp, "disk")
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="full", speed=SLOW)
    idle(qmp)
    nbd.io(address, "write -P 50 3M 64k", "write -z 700k 200k", "discard 1M 512k")
    let_go(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")
    described(case, "copy.qcow2")


@scenario
def backup_raw(case):
    """In another format; what was in the file is gone, and so is what is there the second time."""
    chain, qmp = disk(case)
    path = case.images.raw("copy.raw", "8M", fill=9)
    for _ in range(2):
        qmp.run("drive-backup", job_id="job", device="disk", target=path, format="raw", sync="full", mode="absolute-paths")
        finish(qmp)
    qmp.run("quit")
    case.images.same("copy.raw", chain.expected, form="raw")
    case.note("size", case.images.size("copy.raw"))


@scenario
def backup_top(case):
    """What the top layer holds; the new image stands on the same backing."""
    chain, qmp = plain(case)
    address = export(case, qmp, "disk")
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="top", speed=SLOW)
    idle(qmp)
    nbd.io(address, "write -P 50 0 128k", "write -P 51 3M 64k", "write -P 52 1M 4k")
    case.transcript.mask("len", "offset")
    let_go(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")
    described(case, "copy.qcow2")


@scenario
def backup_none(case):
    """Only what is about to change, into an image on top of the source: together they are what there was."""
    chain, qmp = disk(case)
    case.images.copy("disk.qcow2", "before.raw")
    address = export(case, qmp, "disk")
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="none")
    nbd.io(address, "write -P 50 0 128k", "write -P 51 3M 64k", "write -P 52 1000000 4k")
    qmp.run("block-job-cancel", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")
    described(case, "copy.qcow2")


@scenario
def backup_existing(case):
    """Into images that are there: the format is said or found; the size must be right."""
    chain, qmp = plain(case)
    for name in ("one", "two"):
        case.images.qcow2(f"{name}.qcow2", "4M")
    case.images.qcow2("small.qcow2", "2M")
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("one.qcow2"), sync="full", mode="existing", format="qcow2")
    finish(qmp)
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("two.qcow2"), sync="full", mode="existing")
    finish(qmp)
    case.images.qcow2("over.qcow2", "4M", "base.qcow2")
    case.transcript.mask("len", "offset")
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("over.qcow2"), sync="top", mode="existing")
    finish(qmp)
    qmp.refuse("drive-backup", job_id="job", device="disk", target=case.path("small.qcow2"), sync="full", mode="existing")
    qmp.refuse("drive-backup", job_id="job", device="disk", target=case.path("one.qcow2"), sync="full", mode="existing", format="nonsense")
    qmp.refuse("drive-backup", job_id="job", device="disk", target=case.path("nowhere.qcow2"), sync="full", mode="existing")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    for name in ("one", "two", "over"):
        case.images.same(f"{name}.qcow2", chain.expected)


@scenario
def refusals(case):
    """Arguments that don't fit; nothing is left of them in the graph."""
    _chain, qmp = disk(case)

    def refuse(command="drive-backup", **more):
        qmp.refuse(command, **{"job_id": "job", "device": "disk", "target": case.path("copy.qcow2"), "sync": "full", **more})

    refuse(device="nowhere")
    refuse(target=case.path("no/where"))
    refuse(format="nonsense")
    refuse(format="throttle")
    refuse(format="raw", sync="none")
    refuse(mode="nonsense")
    refuse(job_id="0")
    refuse(sync="bitmap")
    refuse(sync="incremental", bitmap="b")
    refuse(bitmap="b", bitmap_mode="never")
    refuse(speed=-1)
    refuse(filter_node_name="disk")
    refuse("drive-mirror", device="nowhere")
    refuse("drive-mirror", target=case.path("no/where"))
    refuse("drive-mirror", format="nonsense")
    refuse("drive-mirror", format="raw", sync="none")
    refuse("drive-mirror", job_id="0")
    refuse("drive-mirror", replaces="disk")
    refuse("drive-mirror", replaces="base", node_name="copy")
    refuse("drive-mirror", node_name="disk")
    refuse("drive-mirror", granularity=100)
    refuse("drive-mirror", sync="incremental")
    qmp.refuse("drive-mirror", job_id="job", device="disk", sync="full")
    qmp.run("query-jobs")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="none")
    refuse("drive-mirror", job_id="other", target=case.path("other.qcow2"))
    refuse(job_id="other")
    qmp.run("job-cancel", id="job")
    qmp.wait_status("job", "null")


@scenario
def transaction(case):
    """Two backups and a snapshot at one moment; and none of them if one can't be."""
    chain, qmp = disk(case)
    case.images.qcow2("second.qcow2", "1M", writes=["write -P 9 0 1M"])
    qmp.run("blockdev-add", driver="qcow2", node_name="second", file={"driver": "file", "filename": case.path("second.qcow2")})

    def backup_of(device, job, **more):
        data = {"job-id": job, "device": device, "target": case.path(f"{job}.qcow2"), "sync": "full", **more}
        return {"type": "drive-backup", "data": data}

    sync = {"type": "blockdev-snapshot-sync", "data": {"node-name": "second", "snapshot-file": case.path("over.qcow2"), "snapshot-node-name": "over"}}
    qmp.refuse("transaction", actions=[backup_of("disk", "one"), {"type": "abort", "data": {}}])
    qmp.refuse("transaction", actions=[backup_of("disk", "one"), backup_of("nowhere", "two")])
    qmp.run("query-jobs")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("transaction", actions=[backup_of("disk", "one"), sync])
    finish(qmp, "one")
    qmp.run("quit")
    case.images.same("one.qcow2", chain.expected)


@scenario
def mirror(case):
    """Everything into a new file, which takes the disk's place."""
    _chain, qmp = disk(case)
    address = export(case, qmp, "disk")
    qmp.run("drive-mirror", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="full", node_name="copy")
    mirrored(case, qmp, "write -P 50 3M 64k", "write -P 51 2000000 1000", "discard 1M 512k", address=address)
    nbd.io(address, "read -P 50 3M 64k", "write -P 52 0 4k", "flush")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.write(case.path("copy.qcow2"), "read -P 52 0 4k", "read -P 50 3M 64k", "read -P 51 2000000 1000")
    case.images.write(case.path("disk.qcow2"), "read -P 50 3M 64k")
    case.images.check("copy.qcow2")
    described(case, "copy.qcow2")


@scenario
def mirror_top(case):
    """What the top layer holds; the new image stands on the same backing."""
    _chain, qmp = disk(case)
    address = export(case, qmp, "disk")
    for mode in ("background", "write-blocking"):
        qmp.run(
            "drive-mirror", job_id="job", device="disk", target=case.path(f"{mode}.qcow2"), sync="top", copy_mode=mode, node_name="copy", granularity=4096
        )
        qmp.wait("BLOCK_JOB_READY", device="job")
        case.transcript.mask("len", "offset")
        nbd.io(address, "write -P 50 3000000 1000", "write -P 51 100000 4k", "flush")
        qmp.run("block-job-cancel", device="job")
        finish(qmp)
    qmp.run("quit")
    for mode in ("background", "write-blocking"):
        case.images.same(f"{mode}.qcow2", "disk.qcow2", expected_form="qcow2")
        case.images.check(f"{mode}.qcow2")
        described(case, f"{mode}.qcow2")


@scenario
def mirror_none(case):
    """Only what a client changes, in parts of clusters; in the end the new image stands on the old one."""
    chain, qmp = disk(case)
    address = export(case, qmp, "disk")
    qmp.run("drive-mirror", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="none", node_name="copy", granularity=4096)
    changes = ("write -P 50 3M 64k", "write -P 51 2000000 1000", "write -z 1M 512k", "write -P 52 700 10")
    mirrored(case, qmp, *changes, address=address)
    nbd.io(address, "read -P 50 3M 64k", "write -P 53 2M 1000", "flush")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    chain.guest_wrote(*changes)
    chain.guest_wrote("write -P 53 2M 1000")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")
    described(case, "copy.qcow2")


@scenario
def mirror_none_existing(case):
    """Into an image with large clusters that stands on the source."""
    chain, qmp = disk(case)
    address = export(case, qmp, "disk")
    case.images.qcow2("copy.qcow2", "4M", "disk.qcow2", options="cluster_size=1M")
    qmp.run("drive-mirror", job_id="job", device="disk", target=case.path("copy.qcow2"), sync="none", mode="existing", node_name="copy", format="qcow2")
    changes = ("write -P 50 3M 64k", "write -P 51 2000000 1000", "write -P 52 700 10")
    qmp.wait("BLOCK_JOB_READY", device="job")
    case.transcript.mask("len", "offset")
    nbd.io(address, *changes)
    chain.guest_wrote(*changes)
    qmp.run("job-complete", id="job")
    finish(qmp)
    nbd.io(address, "read -P 52 700 10", "write -P 53 2500000 1000", "flush")
    chain.guest_wrote("write -P 53 2500000 1000")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")


@scenario
def mirror_none_alone(case):
    """Into an image that doesn't stand on the source: what isn't copied would be missing from it."""
    _chain, qmp = disk(case)
    case.images.qcow2("alone.qcow2", "4M")
    if qmp.attempt("drive-mirror", job_id="odd", device="disk", target=case.path("alone.qcow2"), sync="none", mode="existing"):
        qmp.wait("BLOCK_JOB_READY", device="odd")
        qmp.run("job-cancel", id="odd")
        qmp.wait_status("odd", "null")
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def mirror_replaces(case):
    """The node below a filter is exchanged for one with a name."""
    _chain, qmp = disk(case)
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={})
    qmp.run("blockdev-add", driver="throttle", node_name="limited", throttle_group="group", file="disk")
    address = export(case, qmp, "limited")
    path = case.path("copy.qcow2")
    qmp.run("drive-mirror", job_id="job", device="limited", target=path, sync="full", node_name="copy", replaces="disk", format="qcow2", unmap=False)
    mirrored(case, qmp, "write -P 50 3M 64k", address=address)
    nbd.io(address, "read -P 50 3M 64k", "write -P 52 0 4k", "flush")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.write(path, "read -P 52 0 4k", "read -P 50 3M 64k")


@scenario
def mirror_to_server(case):
    """Into an NBD export, by both spellings of its address: how a machine's disks are moved to another host."""
    chain, qmp = disk(case)
    case.images.qcow2("far.qcow2", "4M")
    far = case.daemon().qmp
    far.run("blockdev-add", driver="qcow2", node_name="far", file={"driver": "file", "filename": case.path("far.qcow2")})
    export(case, far, "far")
    socket = case.path("nbd.sock")
    for target in (f"nbd:unix:{socket}:exportname=far", f"nbd+unix:///far?socket={socket}"):
        qmp.run("drive-mirror", job_id="job", device="disk", target=target, sync="full", mode="existing", format="raw")
        qmp.wait("BLOCK_JOB_READY", device="job")
        qmp.run("block-job-cancel", device="job")
        finish(qmp)
    qmp.run("quit")
    far.run("quit")
    case.images.same("far.qcow2", chain.expected)


@scenario
def cancelled(case):
    """A job that is cancelled lets its target go; the file stays."""
    _chain, qmp = disk(case)
    for command in ("drive-backup", "drive-mirror"):
        qmp.run(command, job_id="job", device="disk", target=case.path(f"{command}.qcow2"), sync="full", speed=SLOW)
        idle(qmp)
        case.transcript.mask("len", "offset", "current-progress")
        qmp.run("job-cancel", id="job")
        qmp.wait_status("job", "null")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    for command in ("drive-backup", "drive-mirror"):
        check(case.images.info(f"{command}.qcow2")["virtual-size"] == 4 << 20, "the image is there")
        case.images.check(f"{command}.qcow2")


@scenario
def refused_for_a_file_that_is_there(case):
    """What can't be done into any target is refused before the file that is there is made empty."""
    _chain, qmp = disk(case)
    path = case.images.raw("copy.raw", "4M", 7)
    arguments = {"job_id": "job", "device": "disk", "target": path, "format": "raw"}
    qmp.refuse("drive-backup", sync="incremental", bitmap="none", **arguments)
    qmp.refuse("drive-mirror", sync="incremental", **arguments)
    with open(path, "rb") as file:
        case.note("kept", file.read(1) == b"\7")
    qmp.run("quit")
