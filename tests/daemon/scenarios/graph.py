"""What a job needs stays put while it runs: nodes in use, jobs side by side, jobs that would overlap."""

from drive import check, nbd, scenario
from drive.jobs import SLOW, export, finish, idle, let_go


def long_chain(case, **options):
    """Six layers with every node by name."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("n0", "n1", "n2", "n3", "n4")
    qmp = case.daemon().qmp
    chain.add(qmp, **options)
    return chain, qmp


@scenario(parallel=True)
def streams_side_by_side(case):
    """Two streams into disjoint parts of one chain at the same time."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="upper", device="n4", base_node="n2", speed=SLOW)
    qmp.run("block-stream", job_id="lower", device="n2", base_node="n0", speed=SLOW)
    qmp.run("query-block-jobs")
    let_go(qmp, "lower")
    let_go(qmp, "upper")
    qmp.run("quit")
    check(case.images.backing("n4.qcow2")[0] == chain.file("n2"), "the upper link")
    check(case.images.backing("n2.qcow2")[0] == chain.file("n0"), "the lower link")
    chain.reads_as_before()


@scenario(parallel=True)
def lower_first(case):
    """The same, started and ended in the other order."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="lower", device="n2", speed=SLOW)
    if qmp.attempt("block-stream", job_id="upper", device="n4", base_node="n2", speed=SLOW):
        let_go(qmp, "upper")
    let_go(qmp, "lower")
    qmp.run("quit")
    check(case.images.backing("n2.qcow2")[0] is None, "the lower link")
    chain.reads_as_before()


@scenario
def streams_that_overlap(case):
    """Streams that share a node are refused, whichever end they share."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="job", device="n3", base_node="n1", speed=SLOW)
    idle(qmp)
    qmp.refuse("block-stream", job_id="other", device="n3")
    qmp.refuse("block-stream", job_id="other", device="n3", base_node="n2")
    qmp.refuse("block-stream", job_id="other", device="n2", base_node="n0")
    qmp.refuse("block-stream", job_id="other", device="n2")
    qmp.refuse("block-stream", job_id="other", device="n4", base_node="n2")
    qmp.refuse("block-stream", job_id="other", device="n4", base_node="n1")
    qmp.refuse("block-stream", job_id="other", device="n4")
    qmp.refuse("block-stream", job_id="other", device="n4", bottom="n3")
    qmp.run("query-block-jobs")
    let_go(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario(parallel=True)
def neighbours(case):
    """A stream whose base is another's top, and one whose top is another's base."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("n0", "n1", "n2", "n3", "n4", "n5", size="5M")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="middle", device="n3", base_node="n1", speed=SLOW)
    idle(qmp, "middle")
    above = qmp.attempt("block-stream", job_id="above", device="n5", base_node="n3", speed=SLOW)
    below = qmp.attempt("block-stream", job_id="below", device="n1", speed=SLOW)
    if above:
        let_go(qmp, "above")
    if below:
        let_go(qmp, "below")
    let_go(qmp, "middle")
    qmp.run("quit")
    chain.reads_as_before()


@scenario(parallel=True)
def commit_beside_stream(case):
    """A commit below a stream, and a stream above a commit."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="stream", device="n4", base_node="n2", speed=SLOW)
    idle(qmp, "stream")
    started = qmp.attempt("block-commit", job_id="commit", device="n4", top_node="n1", base_node="n0", speed=SLOW)
    again = qmp.attempt("block-commit", job_id="commit2", device="n2", top_node="n1", base_node="n0", speed=SLOW)
    if started:
        let_go(qmp, "commit")
    if again:
        let_go(qmp, "commit2")
    let_go(qmp, "stream")
    qmp.run("quit")
    chain.reads_as_before()


@scenario(parallel=True)
def stream_beside_commit(case):
    """A commit of the lower part runs; streams above it."""
    chain, qmp = long_chain(case)
    qmp.run("block-commit", job_id="commit", device="n4", top_node="n1", base_node="n0", speed=SLOW)
    idle(qmp, "commit")
    qmp.refuse("block-stream", job_id="stream", device="n4")
    qmp.refuse("block-stream", job_id="stream", device="n2", base_node="n0")
    qmp.refuse("block-stream", job_id="stream", device="n1")
    qmp.attempt("block-stream", job_id="near", device="n4", base_node="n1", speed=SLOW)
    started = qmp.attempt("block-stream", job_id="far", device="n4", base_node="n2", speed=SLOW)
    for job in ("near", "far"):
        if qmp.job(job):
            let_go(qmp, job)
    let_go(qmp, "commit")
    case.note("far started", started)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def commits_that_overlap(case):
    """Commits that share a node."""
    chain, qmp = long_chain(case)
    qmp.run("block-commit", job_id="job", device="n4", top_node="n2", base_node="n1", speed=SLOW)
    idle(qmp)
    qmp.refuse("block-commit", job_id="other", device="n4", top_node="n2", base_node="n0")
    qmp.refuse("block-commit", job_id="other", device="n4", top_node="n1", base_node="n0")
    qmp.refuse("block-commit", job_id="other", device="n4", top_node="n3", base_node="n2")
    qmp.refuse("block-commit", job_id="other", device="n4")
    let_go(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def frozen_during_stream(case):
    """Nodes of a running stream aren't deleted, reopened with another backing, resized, or written by others."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="job", device="n3", base_node="n1", speed=SLOW)
    idle(qmp)
    for node in ("n0", "n1", "n2", "n3", "n4", "n3-file", "n2-file"):
        qmp.refuse("blockdev-del", node_name=node) if node != "n4" else None
    qmp.refuse("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "n3", "file": "n3-file", "backing": "n1"}])
    qmp.refuse("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "n3", "file": "n3-file", "backing": None}])
    qmp.attempt("change-backing-file", device="n4", image_node_name="n3", backing_file="n1.qcow2")
    qmp.refuse("block_resize", node_name="n3", size=8 << 20)
    qmp.refuse("block_resize", node_name="n2", size=8 << 20)
    qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("nbd.sock")}})
    qmp.refuse("block-export-add", type="nbd", id="middle", node_name="n2", name="middle", writable=True)
    qmp.refuse("block-export-add", type="nbd", id="base", node_name="n1", name="base", writable=True)
    qmp.run("block-export-add", type="nbd", id="reader", node_name="n2", name="reader")
    qmp.run("block-export-del", id="reader")
    qmp.wait("BLOCK_EXPORT_DELETED", id="reader")
    let_go(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def top_deleted(case):
    """The node that a stream runs on."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="job", device="n4", speed=SLOW)
    idle(qmp)
    qmp.refuse("blockdev-del", node_name="n4")
    qmp.refuse("blockdev-del", node_name="n4-file")
    let_go(qmp)
    qmp.run("blockdev-del", node_name="n4")
    qmp.run("query-named-block-nodes", flat=True)
    chain.reads_as_before()


@scenario
def export_during_stream(case):
    """The top is exported for writing before, during and after; exports go while the job runs."""
    chain, qmp = long_chain(case)
    address = export(case, qmp, "n4", "before")
    qmp.run("block-stream", job_id="job", device="n4", speed=SLOW)
    idle(qmp)
    qmp.run("block-export-add", type="nbd", id="during", node_name="n4", name="during", writable=True)
    nbd.io(address, "write -P 77 1M 64k")
    nbd.io(address.replace("before", "during"), "read -P 77 1M 64k", "write -P 78 2M 64k")
    chain.guest_wrote("write -P 77 1M 64k", "write -P 78 2M 64k")
    qmp.run("block-export-del", id="export-before")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-before")
    let_go(qmp)
    nbd.io(address.replace("before", "during"), "read -P 78 2M 64k", "write -P 79 3M 64k")
    chain.guest_wrote("write -P 79 3M 64k")
    qmp.run("block-export-del", id="during")
    qmp.wait("BLOCK_EXPORT_DELETED", id="during")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def exported_middle(case):
    """A middle node that is exported for writing, and a stream that would copy from it."""
    chain, qmp = long_chain(case)
    qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("nbd.sock")}})
    qmp.attempt("block-export-add", type="nbd", id="middle", node_name="n2", name="middle", writable=True)
    if qmp.attempt("block-stream", job_id="job", device="n4", base_node="n1"):
        finish(qmp)
    qmp.run("query-block-exports")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def snapshot_during_stream(case):
    """A snapshot taken of the top while it is streamed into: refused or right, never half."""
    chain, qmp = long_chain(case)
    case.images.qcow2("over.qcow2", "4M")
    qmp.run("blockdev-add", driver="qcow2", node_name="over", file={"driver": "file", "filename": case.path("over.qcow2")}, backing=None)
    qmp.run("block-stream", job_id="job", device="n4", speed=SLOW)
    idle(qmp)
    qmp.attempt("blockdev-snapshot", node="n4", overlay="over")
    qmp.attempt("blockdev-snapshot-sync", node_name="n3", snapshot_file=case.path("sync.qcow2"), snapshot_node_name="sync")
    let_go(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def base_below_a_filter(case):
    """A stream that is started on a filter, with what that is on as its base: nothing lies between them."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="copy-on-read", node_name="copies", file="top")
    qmp.refuse("block-stream", job_id="job", device="copies", base_node="top")
    qmp.run("block-stream", job_id="job", device="copies")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def named_filters(case):
    """Whoever comes from above meets the node that the user named for a job."""
    chain, qmp = long_chain(case)
    qmp.run("block-stream", job_id="job", device="n3", base_node="n1", filter_node_name="copies", speed=SLOW)
    idle(qmp)
    qmp.refuse("block-stream", job_id="other", device="n4", base_node="n2")
    qmp.refuse("block-stream", job_id="other", device="n3")
    qmp.refuse("block-stream", job_id="other", device="n2")
    qmp.refuse("block-commit", job_id="other", device="n4", base_node="n3")
    qmp.refuse("block-commit", job_id="other", device="n4", top_node="n2", base_node="n1")
    qmp.refuse("block-commit", job_id="other", device="n4", top_node="n1", base_node="n0")
    let_go(qmp)
    qmp.run("block-commit", job_id="job", device="n4", top_node="n1", base_node="n0", filter_node_name="moves", speed=SLOW)
    idle(qmp)
    qmp.refuse("block-stream", job_id="other", device="n4", base_node="n1")
    qmp.refuse("block-stream", job_id="other", device="n3", base_node="n0")
    qmp.refuse("block-commit", job_id="other", device="n4", base_node="n4")
    let_go(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def users_of_a_backups_target(case):
    """Who may read what a backup copies to, goes on doing so, but nobody gives it another size."""
    case.transcript.mask("offset", "len")
    qmp = case.daemon().qmp
    for name in ("disk", "target"):
        path = case.images.raw(f"{name}.raw", "4M", fill=1)
        qmp.run("blockdev-add", driver="raw", node_name=name, file={"driver": "file", "filename": path})
    address = export(case, qmp, "target", writable=False)
    qmp.run("blockdev-backup", job_id="job", device="disk", target="target", sync="full", speed=SLOW)
    idle(qmp)
    nbd.io(address, "read -P 1 0 64k", read_only=True)
    qmp.run("block-export-add", type="nbd", id="other", node_name="target", name="other")
    qmp.refuse("block_resize", node_name="target", size=8 << 20)
    qmp.refuse("blockdev-backup", job_id="other", device="disk", target="target", sync="full")
    path = case.images.raw("third.raw", "4M")
    qmp.run("blockdev-add", driver="raw", node_name="third", file={"driver": "file", "filename": path})
    qmp.refuse("blockdev-backup", job_id="other", device="target", target="third", sync="full")
    let_go(qmp)
    nbd.io(address, "read -P 1 0 4M", read_only=True)


@scenario
def writer_of_a_backups_target(case):
    """A disk that a client may write as the target of a backup: the reference overwrites it."""
    case.transcript.mask("offset", "len")
    qmp = case.daemon().qmp
    for name, byte in (("disk", 1), ("target", 2)):
        path = case.images.raw(f"{name}.raw", "4M", fill=byte)
        qmp.run("blockdev-add", driver="raw", node_name=name, file={"driver": "file", "filename": path})
    address = export(case, qmp, "target")
    if qmp.attempt("blockdev-backup", job_id="job", device="disk", target="target", sync="full"):
        finish(qmp)
    else:
        nbd.io(address, "read -P 2 0 4M")


@scenario
def users_of_a_mirrors_target(case):
    """Nobody reads what a mirror copies to before it is ended."""
    case.transcript.mask("offset", "len")
    qmp = case.daemon().qmp
    for name in ("disk", "target"):
        path = case.images.raw(f"{name}.raw", "4M", fill=1)
        qmp.run("blockdev-add", driver="raw", node_name=name, file={"driver": "file", "filename": path})
    export(case, qmp, "target", writable=False)
    qmp.refuse("blockdev-mirror", job_id="job", device="disk", target="target", sync="full")
    qmp.run("block-export-del", id="export-target")
    qmp.wait("BLOCK_EXPORT_DELETED")
    qmp.run("blockdev-mirror", job_id="job", device="disk", target="target", sync="full", speed=SLOW)
    idle(qmp)
    for writable in (False, True):
        qmp.refuse("block-export-add", type="nbd", id="other", node_name="target", writable=writable)
    qmp.run("block-job-cancel", device="job", force=True)
    qmp.wait("BLOCK_JOB_CANCELLED")
    address = export(case, qmp, "target", start=False)
    nbd.io(address, "read 0 4M")
