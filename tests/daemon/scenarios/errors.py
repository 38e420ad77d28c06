"""What a stream does when a read or a write fails, for each on-error."""

from drive import check, nbd, scenario
from drive.jobs import debug, export, finish, query


def faulty(case, where, on_error="report", top=None, **rule):
    """A chain of two with blkdebug above `where` and a stream on it; gives chain and monitor."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    below = {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "node-name": "base-file", "filename": chain.file("base")}}
    qmp.run("blockdev-add", **below)
    backing = "base"
    if where == "base":
        qmp.run("blockdev-add", **debug("base", **rule))
        backing = "base-debug"
    qmp.run("blockdev-add", driver="file", node_name="top-file", filename=chain.file("top"))
    file = "top-file"
    if where == "top-file":
        qmp.run("blockdev-add", **debug("top-file", **rule))
        file = "top-file-debug"
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file=file, backing=backing)
    qmp.run("block-stream", job_id="job", device="top", on_error=on_error, **(top or {}))
    return chain, qmp


def failed(case, chain, qmp, error):
    """The job ended with this error; the link stays and the data are right."""
    done = finish(qmp)
    check(done.get("error") == error, f"completed with {done.get('error')}, not {error}")
    qmp.run("quit")
    check(case.images.backing("top.qcow2")[0], "the backing link is gone although the stream failed")
    chain.reads_as_before()


def succeeded(case, chain, qmp):
    """The job ended well."""
    done = finish(qmp)
    check("error" not in done, f"completed with {done.get('error')}")
    qmp.run("quit")
    check(not case.images.backing("top.qcow2")[0], "the backing link is there although the stream is done")
    chain.reads_as_before()


# The second half of the first MiB comes from the base alone.
READ = {"iotype": "read", "errno": 5, "sector": 1024}


@scenario
def read_report(case):
    """A read error ends the job."""
    failed(case, *faulty(case, "base", **READ), "Input/output error")


@scenario
def read_report_undismissed(case):
    """The error of a job that is kept for its reader."""
    chain, qmp = faulty(case, "base", top={"auto_dismiss": False}, **READ)
    qmp.wait_status("job", "concluded")
    query(qmp)
    qmp.run("job-dismiss", id="job")
    failed(case, chain, qmp, "Input/output error")


@scenario
def read_ignore_once(case):
    """An ignored error that passes: the job goes on, and ends with that error all the same, or has tried again and misses nothing."""
    chain, qmp = faulty(case, "base", "ignore", once=True, **READ)
    done = finish(qmp)
    qmp.run("quit")
    kept = case.images.backing("top.qcow2")[0] is not None
    check(kept == ("error" in done), f"completed with {done.get('error')}, and the link is {'there' if kept else 'gone'}")
    chain.reads_as_before()


@scenario
def read_ignore_lasting(case):
    """The same when the sector stays unreadable."""
    failed(case, *faulty(case, "base", "ignore", **READ), "Input/output error")


@scenario
def read_stop_once(case):
    """Stopped at an error, resumed: the same place is tried again."""
    chain, qmp = faulty(case, "base", "stop", once=True, **READ)
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    succeeded(case, chain, qmp)


@scenario
def read_stop_job_resume(case):
    """Resumed with job-resume."""
    chain, qmp = faulty(case, "base", "stop", once=True, **READ)
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    qmp.run("job-resume", id="job")
    succeeded(case, chain, qmp)


@scenario
def read_stop_lasting(case):
    """Stopped, resumed, stopped again; then cancelled."""
    chain, qmp = faulty(case, "base", "stop", **READ)
    for _ in range(2):
        qmp.wait("BLOCK_JOB_ERROR", device="job")
        qmp.wait_status("job", "paused")
        query(qmp)
        qmp.run("block-job-resume", device="job")
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    qmp.refuse("block-job-cancel", device="job")
    qmp.run("block-job-cancel", device="job", force=True)
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    check(case.images.backing("top.qcow2")[0], "the backing link is gone")
    chain.reads_as_before()


@scenario
def read_enospc(case):
    """on-error=enospc reports whatever isn't ENOSPC."""
    failed(case, *faulty(case, "base", "enospc", **READ), "Input/output error")


@scenario
def read_enospc_stops(case):
    """on-error=enospc stops at ENOSPC, and says so."""
    chain, qmp = faulty(case, "base", "enospc", once=True, **{**READ, "errno": 28})
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    succeeded(case, chain, qmp)


@scenario
def stop_on_enospc(case):
    """on-error=stop at ENOSPC: nospace is told."""
    chain, qmp = faulty(case, "base", "stop", once=True, **{**READ, "errno": 28})
    event = qmp.wait("BLOCK_JOB_ERROR", device="job")
    check(event["action"] == "stop", f"the action is {event['action']}")
    qmp.wait_status("job", "paused")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    succeeded(case, chain, qmp)


# Any write into the file of the top.
WRITE = {"iotype": "write", "once": True}


@scenario
def write_report(case):
    """A write error ends the job."""
    failed(case, *faulty(case, "top-file", errno=5, **WRITE), "Input/output error")


@scenario
def write_enospc_report(case):
    """A full disk ends the job with its own text."""
    failed(case, *faulty(case, "top-file", errno=28, **WRITE), "No space left on device")


@scenario
def write_stop(case):
    """A write error stops the job; after resuming it succeeds."""
    chain, qmp = faulty(case, "top-file", "stop", errno=5, **WRITE)
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    qmp.run("block-job-resume", device="job")
    succeeded(case, chain, qmp)


@scenario
def write_enospc_stop(case):
    """A full disk stops the job with on-error=enospc."""
    chain, qmp = faulty(case, "top-file", "enospc", errno=28, **WRITE)
    event = qmp.wait("BLOCK_JOB_ERROR", device="job")
    check(event["action"] == "stop", f"the action is {event['action']}")
    qmp.wait_status("job", "paused")
    query(qmp)
    qmp.run("block-job-resume", device="job")
    succeeded(case, chain, qmp)


@scenario
def errno_names(case):
    """Other errors by their text."""
    for number, text in ((13, "Permission denied"), (110, "Connection timed out"), (116, "Stale file handle"), (121, "Remote I/O error")):
        failed(case, *faulty(case, "base", **{**READ, "errno": number}), text)


@scenario
def flush_fails(case):
    """A flush that fails when the link is to be dropped."""
    chain, qmp = faulty(case, "top-file", errno=5, iotype="flush")
    finish(qmp)
    qmp.quiet("query-version")


@scenario
def error_then_again(case):
    """A second stream after one that failed does the rest."""
    chain, qmp = faulty(case, "base", once=True, **READ)
    finish(qmp)
    qmp.run("block-stream", job_id="job", device="top")
    succeeded(case, chain, qmp)


@scenario
def guest_sees_error(case):
    """A client that reads what the base doesn't give gets an error for it, and goes on."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp, wrap={"base": lambda name: debug(name, **READ)})
    client = nbd.Client(case, export(case, qmp, "top"))
    client.do("read 2M 64k")
    case.note("qemu-io", client.fails("read 512k 64k").strip())
    client.close()
    qmp.run("quit")
    chain.reads_as_before()
