"""block-commit: of the middle of a chain, and of the layer that is in use."""

from drive import check, nbd, scenario
from drive.jobs import SLOW, debug, export, finish, idle, let_go


def start(case, names=("base", "mid", "top"), daemon=(), add=None, **options):
    """A chain with a commit on its top; gives chain and monitor."""
    chain = case.images.chain(*names)
    qmp = case.daemon(*daemon).qmp
    chain.add(qmp, **(add or {}))
    qmp.run("block-commit", job_id="job", device=names[-1], **options)
    return chain, qmp


def backing_is(case, image, name):
    """What the header says about the backing file."""
    found = case.images.backing(image)[0]
    check(found == (name and case.path(name)), f"{image} is backed by {found}, not {name}")


@scenario
def intermediate(case):
    """A middle layer into the one below; the overlay's link follows."""
    chain, qmp = start(case, top_node="mid", base_node="base")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("blockdev-del", node_name="mid")
    qmp.run("quit")
    backing_is(case, "top.qcow2", "base.qcow2")
    chain.reads_as_before()
    case.images.check("base.qcow2")


@scenario
def several_layers(case):
    """Several layers at once, by file names."""
    chain = case.images.chain("base", "low", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-commit", job_id="job", device="top", top=chain.file("mid"), base=chain.file("base"))
    finish(qmp)
    qmp.run("quit")
    backing_is(case, "top.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def lowest_by_default(case):
    """Without a base: into the lowest layer."""
    chain, qmp = start(case, ("base", "low", "mid", "top"), top_node="mid")
    finish(qmp)
    qmp.run("quit")
    backing_is(case, "top.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def active(case):
    """The top itself: ready, then completed; the base takes its place."""
    chain, qmp = start(case)
    qmp.wait("BLOCK_JOB_READY", device="job")
    idle(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("block-job-complete", device="job")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.same("base.qcow2", chain.expected)
    case.images.check("base.qcow2")


@scenario
def active_into_middle(case):
    """The top into the layer right below."""
    chain, qmp = start(case, base_node="mid")
    qmp.wait("BLOCK_JOB_READY", device="job")
    qmp.run("job-complete", id="job")
    finish(qmp)
    qmp.run("quit")
    backing_is(case, "mid.qcow2", "base.qcow2")
    case.images.same("mid.qcow2", chain.expected)


@scenario
def active_with_writes(case):
    """A client writes to the top before, during and after; afterwards to what took its place."""
    case.transcript.mask("offset", "len", "current-progress", "total-progress", "busy")
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    client = nbd.Client(case, export(case, qmp, "top"))
    qmp.run("block-commit", job_id="job", device="top", speed=SLOW)
    idle(qmp)
    for step in range(6):
        client.do(f"write -P {60 + step} {step * 500 + 7}k 90k")
        chain.guest_wrote(f"write -P {60 + step} {step * 500 + 7}k 90k")
    qmp.run("block-job-set-speed", device="job", speed=0)
    qmp.wait("BLOCK_JOB_READY", device="job")
    client.do("write -P 70 100k 100k")
    client.do("write -z 2M 200k")
    chain.guest_wrote("write -P 70 100k 100k", "write -z 2M 200k")
    qmp.run("job-complete", id="job")
    finish(qmp)
    client.do("read -P 70 100k 100k")
    client.do("write -P 71 3M 70k")
    client.do("flush")
    chain.guest_wrote("write -P 71 3M 70k")
    client.close()
    qmp.run("query-block-exports")
    qmp.run("quit")
    case.images.same("base.qcow2", chain.expected)
    case.images.check("base.qcow2")


@scenario
def backing_file(case):
    """What the overlay's header says afterwards."""
    chain, qmp = start(case, top_node="mid", base_node="base", backing_file="base.qcow2")
    finish(qmp)
    qmp.run("quit")
    check(case.images.backing("top.qcow2")[0] == "base.qcow2", f"header: {case.images.backing('top.qcow2')}")
    chain.reads_as_before()


@scenario
def smaller_base(case):
    """Into a base that is smaller: it grows."""
    case.images.qcow2("base.qcow2", "1M", writes=["write -P 1 0 1M"])
    case.images.qcow2("mid.qcow2", "3M", "base.qcow2", writes=["write -P 2 2M 64k"])
    case.images.qcow2("top.qcow2", "3M", "mid.qcow2", writes=["write -P 3 64k 64k"])
    case.images.copy("top.qcow2", "expected.raw")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": case.path("top.qcow2")})
    qmp.run("block-commit", job_id="job", device="top", top=case.path("mid.qcow2"), base=case.path("base.qcow2"))
    finish(qmp)
    qmp.run("quit")
    check(case.images.info("base.qcow2")["virtual-size"] == 3 << 20, "the base didn't grow")
    case.images.same("top.qcow2", "expected.raw")
    backing_is(case, "top.qcow2", "base.qcow2")


@scenario
def active_into_smaller_raw(case):
    """The active layer into a smaller raw base."""
    case.images.raw("base.raw", "1M", 1)
    case.images.qcow2("top.qcow2", "2M", "base.raw", backing_format="raw", writes=["write -P 2 1536k 64k"])
    case.images.copy("top.qcow2", "expected.raw")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": case.path("top.qcow2")})
    qmp.run("block-commit", job_id="job", device="top")
    qmp.wait("BLOCK_JOB_READY", device="job")
    qmp.run("job-complete", id="job")
    finish(qmp)
    qmp.run("quit")
    case.images.same("base.raw", "expected.raw", form="raw")


@scenario
def wrong_arguments(case):
    """Each refusal and its reason."""
    chain = case.images.chain("base", "mid", "top")
    case.images.chain("other")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="qcow2", node_name="other", file={"driver": "file", "filename": case.path("other.qcow2")})
    commit = {"job_id": "job", "device": "top"}
    qmp.refuse("block-commit", job_id="job", device="nowhere")
    qmp.refuse("block-commit", **commit, top_node="nowhere")
    qmp.refuse("block-commit", **commit, top_node="other")
    qmp.refuse("block-commit", **commit, base_node="nowhere")
    qmp.refuse("block-commit", **commit, base_node="other")
    qmp.refuse("block-commit", **commit, base_node="top")
    qmp.refuse("block-commit", **commit, top="nowhere.qcow2")
    qmp.refuse("block-commit", **commit, base="nowhere.qcow2")
    qmp.refuse("block-commit", **commit, top=chain.file("mid"), top_node="mid")
    qmp.refuse("block-commit", **commit, base=chain.file("base"), base_node="base")
    qmp.refuse("block-commit", **commit, top_node="base", base_node="mid")
    qmp.refuse("block-commit", **commit, top_node="mid", base_node="mid")
    qmp.refuse("block-commit", **commit, top_node="base")
    qmp.refuse("block-commit", **commit, speed=-1)
    qmp.refuse("block-commit", **commit, backing_file="base.qcow2")
    qmp.refuse("block-commit", job_id="job", device="mid")
    qmp.refuse("block-commit", job_id="job", device="other")
    qmp.refuse("block-commit", device="top")
    qmp.run("query-jobs")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def cancel(case):
    """Cancelled while it runs: links stay, data stay."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain, qmp = start(case, top_node="mid", base_node="base", speed=SLOW)
    idle(qmp)
    qmp.run("block-job-cancel", device="job")
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    backing_is(case, "top.qcow2", "mid.qcow2")
    chain.reads_as_before()


@scenario
def cancel_active_running(case):
    """An active commit cancelled before it is ready."""
    case.transcript.mask("offset", "len", "current-progress", "total-progress", "busy")
    chain, qmp = start(case, speed=SLOW)
    idle(qmp)
    qmp.run("block-job-cancel", device="job")
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "top.qcow2", "mid.qcow2")
    chain.reads_as_before()


@scenario
def finalize(case):
    """auto-finalize=false, for a middle layer."""
    chain, qmp = start(case, top_node="mid", base_node="base", auto_finalize=False)
    qmp.wait("BLOCK_JOB_PENDING", id="job")
    backing_is(case, "top.qcow2", "mid.qcow2")
    qmp.run("job-finalize", id="job")
    finish(qmp)
    qmp.run("quit")
    backing_is(case, "top.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def pending_cancelled(case):
    """auto-finalize=false, then cancel."""
    chain, qmp = start(case, top_node="mid", base_node="base", auto_finalize=False)
    qmp.wait("BLOCK_JOB_PENDING", id="job")
    qmp.run("job-cancel", id="job")
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    backing_is(case, "top.qcow2", "mid.qcow2")
    chain.reads_as_before()


def broken(case, on_error, daemon=(), errno=5, once=True):
    """A commit out of a middle layer whose reads fail."""
    case.transcript.mask("offset", "current-progress", "busy")
    rule = {"iotype": "read", "errno": errno, "sector": 2048, "once": once}
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon(*daemon).qmp
    chain.add(qmp, wrap={"mid": lambda name: debug(name, **rule)})
    qmp.run("block-commit", job_id="job", device="top", top_node="mid-debug", base_node="base", on_error=on_error)
    return chain, qmp


@scenario
def read_error_report(case):
    """A read error ends the commit."""
    chain, qmp = broken(case, "report")
    done = finish(qmp)
    check(done.get("error") == "Input/output error", f"completed: {done}")
    qmp.run("quit")
    backing_is(case, "top.qcow2", "mid.qcow2")
    chain.reads_as_before()


@scenario
def read_error_stop(case):
    """A read error stops the commit; resumed, it succeeds."""
    chain, qmp = broken(case, "stop")
    qmp.wait("BLOCK_JOB_ERROR", device="job")
    qmp.wait_status("job", "paused")
    qmp.run("query-block-jobs")
    qmp.run("job-resume", id="job")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def read_error_ignore(case):
    """Ignored: tried again until it works."""
    chain, qmp = broken(case, "ignore")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def filter_node_name(case):
    """The filter of a commit by a name of one's own."""
    case.transcript.mask("offset", "len", "current-progress", "total-progress", "busy")
    chain, qmp = start(case, speed=SLOW, filter_node_name="shield")
    idle(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("block-job-set-speed", device="job", speed=0)
    qmp.wait("BLOCK_JOB_READY", device="job")
    qmp.run("job-complete", id="job")
    finish(qmp)
    qmp.run("quit")
    case.images.same("base.qcow2", chain.expected)


@scenario
def read_only_base(case):
    """A base that is open for reading is opened for writing for the job, and is read-only again."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": chain.file("top")})
    qmp.run("block-commit", job_id="job", device="top", top=chain.file("mid"))
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "top.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def paced(case):
    """A speed, then none."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain, qmp = start(case, top_node="mid", base_node="base", speed=SLOW)
    idle(qmp)
    qmp.run("query-block-jobs")
    qmp.run("job-pause", id="job")
    qmp.wait_status("job", "paused")
    qmp.run("job-resume", id="job")
    let_go(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def base_of_two(case):
    """A base that another disk stands on as well: what a commit wrote there, that disk would read."""
    chain = case.images.chain("base", "top")
    other = case.images.qcow2("other.qcow2", None, backing="base.qcow2")
    case.images.copy("other.qcow2", "other-expected.raw")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="qcow2", node_name="other", file={"driver": "file", "filename": other}, backing="base")
    address = export(case, qmp, "other", writable=False)
    started = qmp.attempt("block-commit", job_id="job", device="top")
    case.note("started", started)
    if started:
        # The reference lets its users see to that.
        qmp.run("quit")
        return
    nbd.io(address, "read -P 1 0 64k", "read -P 0 1M 64k", read_only=True)
    qmp.run("block-export-del", id="export-other")
    qmp.run("block-commit", job_id="job", device="top", speed=SLOW)
    idle(qmp)
    qmp.refuse("block-export-add", type="nbd", id="again", node_name="other")
    qmp.run("job-cancel", id="job")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def middle_of_two(case):
    """A layer between the ends of a commit, and another disk on it: that disk would read a mixture. On the top it reads as before."""
    case.transcript.mask("offset")
    chain = case.images.chain("base", "mid", "top")
    other = case.images.qcow2("other.qcow2", None, backing="mid.qcow2")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="qcow2", node_name="other", file={"driver": "file", "filename": other}, backing="mid")
    address = export(case, qmp, "other", writable=False)
    qmp.refuse("block-commit", job_id="job", device="top", base_node="base")
    qmp.run("block-commit", job_id="job", device="top", top_node="mid", base_node="base", speed=SLOW)
    idle(qmp)
    qmp.run("job-cancel", id="job")
    nbd.io(address, "read -P 1 0 64k", "read -P 2 1M 64k", read_only=True)
    qmp.run("block-export-del", id="export-other")
    qmp.run("block-commit", job_id="job", device="top", speed=SLOW)
    idle(qmp)
    qmp.refuse("block-export-add", type="nbd", id="again", node_name="other")
    qmp.run("job-cancel", id="job")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def stream_down_to_it(case):
    """A stream whose base is the node that stands for a commit: the overlay of what is committed goes, and the one above stands on the base in the end."""
    case.transcript.mask("offset", "len", "current-progress", "total-progress", "busy")
    chain, qmp = start(case, ("base", "low", "mid", "high", "top"), top_node="low", base_node="base", filter_node_name="filter", speed=SLOW)
    idle(qmp)
    qmp.run("block-stream", job_id="stream", device="high", base_node="filter")
    finish(qmp, "stream")
    let_go(qmp)
    qmp.run("blockdev-del", node_name="mid")
    qmp.run("blockdev-del", node_name="low")
    qmp.run("quit")
    backing_is(case, "high.qcow2", "base.qcow2")
    chain.reads_as_before()
    case.images.check("high.qcow2")
    case.images.check("base.qcow2")


@scenario
def two_overlays(case):
    """Both images that stand on what is committed stand on the base afterwards."""
    chain = case.images.chain("base", "mid", "top")
    case.images.qcow2("other.qcow2", "4M", "mid.qcow2", writes=["write -P 77 1M 64k"])
    expected = case.images.copy("other.qcow2", "other-expected.raw")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="qcow2", node_name="other", backing="mid", file={"driver": "file", "filename": case.path("other.qcow2")})
    qmp.run("block-commit", job_id="job", device="top", top_node="mid", base_node="base")
    finish(qmp)
    qmp.run("blockdev-del", node_name="mid")
    qmp.run("quit")
    for image in ("top.qcow2", "other.qcow2"):
        backing_is(case, image, "base.qcow2")
    chain.reads_as_before()
    case.images.same("other.qcow2", expected)
