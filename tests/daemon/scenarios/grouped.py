"""transaction with completion-mode `grouped`: the jobs that it starts all succeed, or all are cancelled."""

from drive import scenario
from drive.jobs import SLOW, debug, finish, idle, query

from .backup import copy, disk


def two_disks(case):
    """Two disks and two targets; gives the monitor."""
    _chain, qmp = disk(case)
    copy(case, qmp)
    case.images.qcow2("other.qcow2", "2M", writes=["write -P 7 0 2M"])
    qmp.run("blockdev-add", driver="qcow2", node_name="other", file={"driver": "file", "filename": case.path("other.qcow2")})
    return qmp


def begin(qmp, one=None, two=None, **properties):
    """Starts both in one transaction."""
    actions = [
        {"type": "blockdev-backup", "data": {"job-id": "one", "device": "disk", "target": "copy", "sync": "full", **(one or {})}},
        {"type": "blockdev-backup", "data": {"job-id": "two", "device": "other", "target": "small", "sync": "full", **(two or {})}},
    ]
    qmp.run("transaction", actions=actions, properties={"completion-mode": "grouped", **properties})


def one_waits(case):
    """Two disks, one of which has been backed up and waits for the other."""
    qmp = two_disks(case)
    copy(case, qmp, "small", "2M")
    begin(qmp, two={"speed": SLOW})
    qmp.wait_status("one", "waiting")
    idle(qmp, "two")
    case.transcript.mask("offset", "current-progress")
    return qmp


@scenario(parallel=True)
def both(case):
    """The first waits for the second."""
    qmp = one_waits(case)
    query(qmp)
    qmp.refuse("job-finalize", id="one")
    qmp.refuse("job-pause", id="one")
    qmp.run("block-job-set-speed", device="two", speed=0)
    finish(qmp, "one")
    finish(qmp, "two")
    qmp.run("query-jobs")
    qmp.run("quit")


@scenario(parallel=True)
def cancelled_while_it_works(case):
    """One is cancelled, and the other, which has done its work, with it."""
    qmp = one_waits(case)
    qmp.run("block-job-cancel", device="two")
    qmp.wait_status("two", "null")
    qmp.wait_status("one", "null")
    qmp.run("blockdev-del", node_name="copy")
    qmp.run("blockdev-del", node_name="small")


@scenario(parallel=True)
def cancelled_while_it_waits(case):
    """The one that waits is cancelled, and the one that works with it."""
    qmp = one_waits(case)
    qmp.run("job-cancel", id="one")
    qmp.wait_status("one", "null")
    qmp.wait_status("two", "null")
    qmp.run("query-jobs")


@scenario(parallel=True)
def fails(case):
    """One fails; the other is cancelled."""
    qmp = two_disks(case)
    copy(case, qmp, "small", "2M", file=debug("small-file", iotype="write", errno=5, sector=1024))
    case.transcript.mask("offset", "current-progress")
    begin(qmp, one={"speed": SLOW, "auto-dismiss": False})
    qmp.wait_status("two", "null")
    qmp.wait_status("one", "concluded")
    qmp.run("query-jobs")
    qmp.run("job-dismiss", id="one")
    qmp.wait_status("one", "null")


@scenario(parallel=True)
def finalized_by_one(case):
    """One waits to be finalised, and so do both; either of them finalises both."""
    qmp = two_disks(case)
    copy(case, qmp, "small", "2M")
    for which in ("one", "two"):
        begin(qmp, one={"auto-finalize": False})
        qmp.wait("BLOCK_JOB_PENDING", id="one")
        qmp.wait_status("two", "pending")
        query(qmp)
        qmp.run("job-finalize", id=which)
        finish(qmp, "one")
        finish(qmp, "two")


@scenario(parallel=True)
def cancelled_while_pending(case):
    """Both are pending; a cancel of one ends both."""
    qmp = two_disks(case)
    copy(case, qmp, "small", "2M")
    begin(qmp, one={"auto-finalize": False})
    qmp.wait("BLOCK_JOB_PENDING", id="one")
    qmp.wait_status("two", "pending")
    qmp.run("job-cancel", id="two")
    qmp.wait_status("one", "null")
    qmp.wait_status("two", "null")


@scenario(parallel=True)
def alone(case):
    """A group of one, of none, and one that can't begin; individual is what it says."""
    qmp = two_disks(case)
    copy(case, qmp, "small", "2M")
    backup = {"type": "blockdev-backup", "data": {"job-id": "one", "device": "disk", "target": "copy", "sync": "full"}}
    grouped = {"completion-mode": "grouped"}
    qmp.run("transaction", actions=[backup], properties=grouped)
    finish(qmp, "one")
    qmp.run("transaction", actions=[], properties=grouped)
    qmp.refuse("transaction", actions=[backup, {"type": "abort", "data": {}}], properties=grouped)
    snapshot = {"type": "blockdev-snapshot", "data": {"node": "disk", "overlay": "small"}}
    qmp.refuse("transaction", actions=[backup, snapshot], properties=grouped)
    qmp.refuse("transaction", actions=[backup, {**backup, "data": {**backup["data"], "job-id": "two"}}], properties=grouped)
    qmp.refuse("transaction", actions=[backup], properties={"completion-mode": "nonsense"})
    begin(qmp, two={"speed": SLOW}, **{"completion-mode": "individual"})
    finish(qmp, "one")
    idle(qmp, "two")
    case.transcript.mask("offset", "current-progress")
    qmp.run("job-cancel", id="two")
    qmp.wait_status("two", "null")


@scenario(parallel=True)
def quits(case):
    """The daemon ends while one waits and the other works."""
    qmp = one_waits(case)
    qmp.run("quit")
