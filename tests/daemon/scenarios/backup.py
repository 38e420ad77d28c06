"""blockdev-backup: another node gets what a node held at one moment, while guests go on writing."""

from drive import check, nbd, scenario
from drive.jobs import SLOW, debug, export, finish, idle, let_go, query


def disk(case, name="disk", size="4M", **options):
    """A daemon with a chain of two that is a client's disk; gives the monitor. The first image of a scenario starts the daemon."""
    chain = case.images.chain("base", name, size=size)
    qmp = case.daemon().qmp
    chain.add(qmp, **options)
    return chain, qmp


def copy(case, qmp, name="copy", size="4M", backing=None, file=None):
    """An empty target."""
    case.images.qcow2(f"{name}.qcow2", size, f"{backing}.qcow2" if backing else None)
    qmp.run("blockdev-add", driver="file", node_name=f"{name}-file", filename=case.path(f"{name}.qcow2"))
    if file:
        qmp.run("blockdev-add", **file)
    qmp.run("blockdev-add", driver="qcow2", node_name=name, file=file["node-name"] if file else f"{name}-file", backing=backing)


@scenario
def full(case):
    """A whole chain into an empty image."""
    chain, qmp = disk(case)
    copy(case, qmp)
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")
    chain.reads_as_before()


@scenario
def into_raw(case):
    """Into a raw file that holds something else."""
    chain, qmp = disk(case)
    path = case.images.raw("copy.raw", "4M", fill=9)
    qmp.run("blockdev-add", driver="raw", node_name="copy", file={"driver": "file", "filename": path})
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full")
    finish(qmp)
    qmp.run("quit")
    case.images.same("copy.raw", chain.expected, form="raw")


@scenario
def of_one_moment(case):
    """What a client writes, zeroes and discards while the job runs isn't in the copy; its disk has it."""
    chain, qmp = disk(case, discard="unmap")
    copy(case, qmp)
    address = export(case, qmp, "disk")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", speed=SLOW)
    idle(qmp)
    nbd.io(address, "write -P 50 3M 64k", "write -P 51 2000000 1000", "write -z 700k 200k", "discard 1M 512k", "write -P 52 0 4k", "flush")
    nbd.io(address, "read -P 50 3M 64k", "read -P 51 2000000 1000", "read -P 0 700k 200k", "read -P 52 0 4k")
    let_go(qmp)
    nbd.io(address, "read -P 50 3M 64k", "read -P 51 2000000 1000", "read -P 0 700k 200k", "read -P 52 0 4k")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2")
    case.images.check("disk.qcow2")


@scenario
def through_a_filter(case):
    """A client that comes through a throttle node is held to the same moment."""
    chain, qmp = disk(case)
    copy(case, qmp)
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={})
    qmp.run("blockdev-add", driver="throttle", node_name="limited", throttle_group="group", file="disk")
    address = export(case, qmp, "limited")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", speed=SLOW)
    idle(qmp)
    nbd.io(address, "write -P 50 3M 64k", "read -P 50 3M 64k")
    let_go(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def top(case):
    """What the top layer holds, into an image with the same backing."""
    chain, qmp = disk(case)
    copy(case, qmp, backing="base")
    address = export(case, qmp, "disk")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="top", speed=SLOW)
    idle(qmp)
    nbd.io(address, "write -P 50 0 128k", "write -P 51 3M 64k", "write -P 52 1M 4k")
    case.transcript.mask("len", "offset")
    let_go(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    held = {granule for start, length, depth, *_ in case.images.map("copy.qcow2") if depth == 0 for granule in range(start >> 16, (start + length) >> 16)}
    case.note("held", sorted(held))


@scenario
def none(case):
    """Only what a client is about to change is saved; the job ends by a cancel."""
    chain, qmp = disk(case)
    copy(case, qmp)
    address = export(case, qmp, "disk")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="none")
    query(qmp)
    nbd.io(address, "write -P 50 0 64k", "write -P 51 1M 64k", "write -P 52 1M 64k", "write -P 53 1500000 10")
    query(qmp)
    qmp.refuse("job-complete", id="job")
    qmp.run("block-job-pause", device="job")
    query(qmp)
    nbd.io(address, "write -P 54 64k 64k")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    qmp.run("block-job-cancel", device="job")
    qmp.wait_status("job", "null")
    nbd.io(address, "write -P 55 3M 64k")
    qmp.run("quit")
    case.images.check("copy.qcow2")
    case.images.write(case.path("copy.qcow2"), "read -P 1 0 128k", "read -P 2 1M 64k", "read -P 0 3M 64k")
    case.note("saved", case.images.map("copy.qcow2"))


@scenario
def refusals(case):
    """Arguments that don't fit."""
    _chain, qmp = disk(case)
    copy(case, qmp)
    copy(case, qmp, "small", "2M")

    def refuse(**more):
        qmp.refuse("blockdev-backup", **{"job_id": "job", "device": "disk", "target": "copy", "sync": "full", **more})

    qmp.refuse("blockdev-backup", device="disk", target="copy", sync="full")
    qmp.refuse("blockdev-backup", job_id="job", device="disk", target="copy")
    refuse(job_id="0")
    refuse(device="nowhere")
    refuse(target="nowhere")
    refuse(target="disk")
    refuse(target="small")
    refuse(sync="nonsense")
    refuse(sync="incremental")
    refuse(sync="bitmap")
    refuse(sync="bitmap", bitmap="b")
    refuse(bitmap="b")
    refuse(bitmap="b", bitmap_mode="never")
    refuse(bitmap_mode="never")
    refuse(speed=-1)
    refuse(on_source_error="nonsense")
    refuse(filter_node_name="disk")
    refuse(x_perf={"max-workers": 0})
    refuse(x_perf={"max-chunk": -1})
    refuse(x_perf={"max-chunk": 512})
    refuse(x_perf={"min-cluster-size": 100})
    qmp.run("query-jobs")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="none")
    refuse()
    refuse(job_id="other", target="small")
    qmp.refuse("blockdev-backup", job_id="other", device="small", target="copy", sync="full")
    qmp.refuse("blockdev-del", node_name="copy")
    qmp.refuse("block-job-change", id="job", type="backup")
    qmp.run("job-cancel", id="job")
    qmp.wait_status("job", "null")


@scenario
def unsupported(case):
    """What the reference takes, and whoever doesn't must say so and begin nothing."""
    _chain, qmp = disk(case, discard="unmap")
    copy(case, qmp)
    if qmp.attempt("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", discard_source=True):
        finish(qmp)
    qmp.run("query-jobs")


@scenario
def perf(case):
    """x-perf that makes sense."""
    chain, qmp = disk(case)
    copy(case, qmp)
    more = {"min-cluster-size": 131072, "max-workers": 2, "max-chunk": 262144, "use-copy-range": True}
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", x_perf=more)
    finish(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def by_hand(case):
    """auto-finalize and auto-dismiss off; a client writes while the job is pending, and the copy doesn't care."""
    chain, qmp = disk(case)
    copy(case, qmp)
    address = export(case, qmp, "disk")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", auto_finalize=False, auto_dismiss=False)
    qmp.wait("BLOCK_JOB_PENDING", id="job")
    query(qmp)
    nbd.io(address, "write -P 50 0 64k")
    qmp.run("job-finalize", id="job")
    query(qmp)
    qmp.run("job-dismiss", id="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def cancel(case):
    """Cancelled half-way, and once more while pending; then the target is free."""
    chain, qmp = disk(case)
    copy(case, qmp)
    address = export(case, qmp, "disk")
    case.transcript.mask("offset", "current-progress")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", speed=SLOW)
    idle(qmp)
    qmp.run("block-job-cancel", device="job")
    qmp.wait_status("job", "null")
    nbd.io(address, "write -P 50 3M 64k")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", auto_finalize=False)
    qmp.wait("BLOCK_JOB_PENDING", id="job")
    qmp.run("job-cancel", id="job")
    qmp.wait_status("job", "null")
    qmp.run("blockdev-del", node_name="copy")
    qmp.run("quit")
    chain.guest_wrote("write -P 50 3M 64k")
    chain.reads_as_before()
    case.images.check("copy.qcow2")


@scenario
def pause(case):
    """Paused: the job stands still, a client's writes are saved all the same."""
    chain, qmp = disk(case)
    copy(case, qmp)
    address = export(case, qmp, "disk")
    case.transcript.mask("offset", "current-progress")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", speed=SLOW)
    idle(qmp)
    qmp.run("job-pause", id="job")
    qmp.refuse("job-pause", id="job")
    query(qmp)
    nbd.io(address, "write -P 50 3M 64k")
    qmp.run("job-resume", id="job")
    let_go(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def quit_meanwhile(case):
    """The daemon ends while the job runs."""
    chain, qmp = disk(case)
    copy(case, qmp)
    case.transcript.mask("offset")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", speed=SLOW)
    idle(qmp)
    qmp.run("quit")
    chain.reads_as_before()
    case.images.check("copy.qcow2")


@scenario(parallel=True)
def two_targets(case):
    """Two backups of one node, begun one after the other with a write in between."""
    chain, qmp = disk(case)
    copy(case, qmp)
    copy(case, qmp, "later")
    address = export(case, qmp, "disk")
    case.transcript.mask("offset", "current-progress")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", speed=SLOW)
    idle(qmp)
    nbd.io(address, "write -P 50 3M 64k")
    qmp.run("blockdev-backup", job_id="late", device="disk", target="later", sync="full", speed=SLOW)
    idle(qmp, "late")
    nbd.io(address, "write -P 51 3M 32k", "write -P 52 2M 64k")
    let_go(qmp)
    let_go(qmp, "late")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    chain.guest_wrote("write -P 50 3M 64k")
    case.images.same("later.qcow2", chain.expected)


def failing(case, where, rule, **more):
    """A backup whose source or target fails; gives chain and monitor."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "disk")
    qmp = case.daemon().qmp
    wrap = {"base": lambda name: debug(name, **rule)} if where == "source" else None
    chain.add(qmp, wrap)
    copy(case, qmp, file=debug("copy-file", **rule) if where == "target" else None)
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", **more)
    return chain, qmp


READ = {"iotype": "read", "errno": 5, "sector": 1024}
WRITE = {"iotype": "write", "errno": 28, "sector": 4096}


@scenario
def source_report(case):
    """A read error ends the job."""
    chain, qmp = failing(case, "source", READ)
    check(finish(qmp).get("error") == "Input/output error", "the error")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def source_stop(case):
    """Stopped at a read error that passes, and resumed. The policy for the target doesn't count."""
    chain, qmp = failing(case, "source", {"once": True, **READ}, on_source_error="stop", on_target_error="report")
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    check("error" not in finish(qmp), "it went on")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def target_report(case):
    """A write error ends the job, whatever is to be done about read errors."""
    chain, qmp = failing(case, "target", WRITE, on_source_error="stop")
    check(finish(qmp).get("error") == "No space left on device", "the error")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def target_enospc(case):
    """Stopped because no space is left, resumed when there is."""
    chain, qmp = failing(case, "target", {"once": True, **WRITE}, on_target_error="enospc")
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    check("error" not in finish(qmp), "it went on")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.check("copy.qcow2", leaks=True)


@scenario
def target_ignore(case):
    """A write error that passes and is to be ignored: that part is tried again."""
    chain, qmp = failing(case, "target", {"once": True, **WRITE}, on_target_error="ignore")
    check("error" not in finish(qmp), "it went on")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)


@scenario
def cannot_save(case):
    """A client's write fails, and changes nothing, if what it would overwrite can't be saved; the job doesn't end by that."""
    case.transcript.mask("offset", "current-progress")
    chain, qmp = disk(case)
    rule = {"iotype": "write", "errno": 28, "once": True}
    copy(case, qmp, file=debug("copy-file", **rule))
    address = export(case, qmp, "disk")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="none")
    case.note("refused", "No space left" in nbd.io_fails(address, "write -P 50 0 64k"))
    nbd.io(address, "read -P 1 0 64k")
    query(qmp)
    nbd.io(address, "write -P 50 0 64k", "read -P 50 0 64k")
    qmp.run("block-job-cancel", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    chain.guest_wrote("write -P 50 0 64k")
    chain.reads_as_before()
    case.images.write(case.path("copy.qcow2"), "read -P 1 0 64k")


@scenario(parallel=True)
def transaction(case):
    """Two disks at one moment."""
    chain, qmp = disk(case)
    copy(case, qmp)
    case.images.qcow2("other.qcow2", "2M", writes=["write -P 7 0 2M"])
    qmp.run("blockdev-add", driver="qcow2", node_name="other", file={"driver": "file", "filename": case.path("other.qcow2")})
    copy(case, qmp, "small", "2M")
    address = export(case, qmp, "disk")
    second = export(case, qmp, "other", start=False)
    case.transcript.mask("offset", "current-progress")

    def action(job, device, target, **more):
        return {"type": "blockdev-backup", "data": {"job-id": job, "device": device, "target": target, "sync": "full", "speed": SLOW, **more}}

    first = action("job", "disk", "copy")
    qmp.refuse("transaction", actions=[first, {"type": "abort", "data": {}}])
    qmp.refuse("transaction", actions=[first, action("two", "other", "copy")])
    qmp.refuse("transaction", actions=[first, action("two", "other", "nowhere")])
    qmp.run("query-jobs")
    nbd.io(address, "write -P 49 512k 64k")
    chain.guest_wrote("write -P 49 512k 64k")
    qmp.run("transaction", actions=[first, action("two", "other", "small")])
    idle(qmp)
    idle(qmp, "two")
    nbd.io(address, "write -P 50 3M 64k")
    nbd.io(second, "write -P 51 1M 64k")
    let_go(qmp)
    let_go(qmp, "two")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.images.write(case.path("small.qcow2"), "read -P 7 0 2M")


@scenario
def read_only_target(case):
    """What is open for reading only is no target of a copy, neither a backup nor a mirror."""
    case.images.raw("disk.raw", "1M", 1)
    case.images.raw("target.raw", "1M", 2)
    qmp = case.daemon().qmp
    for name, more in (("disk", {}), ("target", {"read_only": True})):
        qmp.run("blockdev-add", driver="raw", node_name=name, file={"driver": "file", "filename": case.path(f"{name}.raw")}, **more)
    qmp.refuse("blockdev-mirror", job_id="job", device="disk", target="target", sync="full")
    qmp.refuse("blockdev-backup", job_id="job", device="disk", target="target", sync="full")
    qmp.run("quit")
    case.images.same("target.raw", case.images.raw("expected.raw", "1M", 2), form="raw")


@scenario
def mirror_in_the_middle(case):
    """Only what nothing stands on is mirrored: an image above names its backing file, and keeps its own."""
    case.images.chain("base", "top").add(qmp := case.daemon().qmp)
    qmp.run("blockdev-add", driver="null-co", node_name="target", size=4 << 20)
    for source in ("base", "top-file"):
        qmp.refuse("blockdev-mirror", job_id="job", device=source, target="target", sync="full")
    qmp.run("quit")
