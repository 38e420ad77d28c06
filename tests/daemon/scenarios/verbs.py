"""The states of a job and the verbs: what each does, which are refused in which state and why."""

from drive import check, scenario
from drive.jobs import SLOW, finish, idle, let_go, query

ALL = ["job-pause", "job-resume", "job-cancel", "job-complete", "job-finalize", "job-dismiss"]
OLD = ["block-job-pause", "block-job-resume", "block-job-cancel", "block-job-complete", "block-job-finalize", "block-job-dismiss"]


def start(case, command="block-stream", names=("base", "mid", "top"), **options):
    """A chain with a job on it; gives chain and monitor."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain(*names)
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run(command, job_id="job", device="top", **options)
    if "speed" in options:
        idle(qmp)
    return chain, qmp


def verb(qmp, name, refuse=True, **more):
    """One verb on the job, in either family of commands."""
    old = name.startswith("block-job") and name not in ("block-job-finalize", "block-job-dismiss")
    act = qmp.refuse if refuse else qmp.run
    return act(name, **({"device": "job"} if old else {"id": "job"}), **more)


def backing_agrees(case, kept):
    """The link is there or gone, as the replies and events said."""
    found = case.images.backing("top.qcow2")[0]
    check((found is not None) == kept, f"the backing link is {found}")


@scenario
def no_such_job(case):
    """Every verb on a job that isn't there."""
    qmp = case.daemon().qmp
    for name in ALL + OLD:
        verb(qmp, name)
    qmp.refuse("block-job-set-speed", device="job", speed=1)
    verb(qmp, "block-job-cancel", force=True)
    query(qmp)


@scenario
def running(case):
    """What a running job refuses."""
    chain, qmp = start(case, speed=SLOW)
    query(qmp)
    for name in ["job-resume", "job-complete", "job-finalize", "job-dismiss"]:
        verb(qmp, name)
        verb(qmp, "block-" + name)
    query(qmp)
    let_go(qmp)
    qmp.run("quit")
    backing_agrees(case, False)
    chain.reads_as_before()


@scenario
def pause_and_resume(case):
    """Pausing and resuming, in one family and in the other."""
    chain, qmp = start(case, speed=SLOW)
    for family in ("job", "block-job"):
        verb(qmp, f"{family}-pause", refuse=False)
        qmp.wait_status("job", "paused")
        verb(qmp, "job-pause")
        verb(qmp, "block-job-pause")
        query(qmp)
        for name in ["job-complete", "job-finalize", "job-dismiss"]:
            verb(qmp, name)
        verb(qmp, f"{family}-resume", refuse=False)
        qmp.wait_status("job", "running")
        verb(qmp, f"{family}-resume")
    query(qmp)
    let_go(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def cancel_running(case):
    """Cancel while it runs: the link stays, and what was copied is no harm."""
    chain, qmp = start(case, speed=SLOW)
    verb(qmp, "block-job-cancel", refuse=False)
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    query(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_agrees(case, True)
    chain.reads_as_before()


@scenario
def job_cancel_running(case):
    """The same with job-cancel."""
    chain, qmp = start(case, speed=SLOW)
    verb(qmp, "job-cancel", refuse=False)
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    backing_agrees(case, True)
    chain.reads_as_before()


@scenario
def cancel_forced(case):
    """And by force."""
    chain, qmp = start(case, speed=SLOW)
    verb(qmp, "block-job-cancel", refuse=False, force=True)
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    qmp.run("quit")
    backing_agrees(case, True)
    chain.reads_as_before()


@scenario
def cancel_paused(case):
    """A paused job: block-job-cancel needs force if the user paused it; job-cancel doesn't."""
    for name, force in (("block-job-cancel", True), ("job-cancel", None)):
        chain, qmp = start(case, speed=SLOW)
        verb(qmp, "job-pause", refuse=False)
        qmp.wait_status("job", "paused")
        verb(qmp, "block-job-cancel")
        query(qmp)
        verb(qmp, name, refuse=False, **({"force": True} if force else {}))
        qmp.wait("BLOCK_JOB_CANCELLED", device="job")
        qmp.wait_status("job", "null")
        query(qmp)
        qmp.run("quit")
        backing_agrees(case, True)
        chain.reads_as_before()


@scenario
def finalize(case):
    """auto-finalize=false: pending until told; the link is dropped only then."""
    chain, qmp = start(case, auto_finalize=False)
    qmp.wait("BLOCK_JOB_PENDING")
    query(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    backing_agrees(case, True)
    for name in ["job-pause", "job-resume", "job-complete", "job-dismiss"]:
        verb(qmp, name)
        verb(qmp, "block-" + name)
    qmp.attempt("block-job-set-speed", device="job", speed=5)
    verb(qmp, "job-finalize", refuse=False)
    finish(qmp)
    query(qmp)
    qmp.run("quit")
    backing_agrees(case, False)
    chain.reads_as_before()


@scenario
def block_job_finalize(case):
    """The same with the other family's verb."""
    chain, qmp = start(case, auto_finalize=False, base_node="base")
    qmp.wait("BLOCK_JOB_PENDING")
    verb(qmp, "block-job-finalize", refuse=False)
    finish(qmp)
    qmp.run("quit")
    backing_agrees(case, True)
    chain.reads_as_before()


@scenario
def cancel_pending(case):
    """Cancel instead of finalize: everything is copied, the link stays."""
    for name in ("job-cancel", "block-job-cancel"):
        chain, qmp = start(case, auto_finalize=False)
        qmp.wait("BLOCK_JOB_PENDING")
        verb(qmp, name, refuse=False)
        qmp.wait("BLOCK_JOB_CANCELLED", device="job")
        qmp.wait_status("job", "null")
        query(qmp)
        qmp.run("quit")
        backing_agrees(case, True)
        chain.reads_as_before()


@scenario
def dismiss(case):
    """auto-dismiss=false: concluded until told."""
    chain, qmp = start(case, auto_dismiss=False)
    qmp.wait_status("job", "concluded")
    query(qmp)
    backing_agrees(case, False)
    for name in ["job-pause", "job-resume", "job-cancel", "job-complete", "job-finalize"]:
        verb(qmp, name)
        verb(qmp, "block-" + name)
    verb(qmp, "block-job-cancel", force=True)
    qmp.attempt("block-job-set-speed", device="job", speed=5)
    qmp.refuse("block-stream", job_id="job", device="top")
    verb(qmp, "job-dismiss", refuse=False)
    query(qmp)
    verb(qmp, "job-dismiss")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def block_job_dismiss(case):
    """The same with the other family's verb, after a cancel, whose error is shown."""
    chain, qmp = start(case, auto_dismiss=False, speed=SLOW)
    verb(qmp, "job-cancel", refuse=False)
    qmp.wait_status("job", "concluded")
    query(qmp)
    verb(qmp, "block-job-dismiss", refuse=False)
    qmp.wait_status("job", "null")
    query(qmp)
    qmp.run("quit")
    backing_agrees(case, True)
    chain.reads_as_before()


@scenario
def all_by_hand(case):
    """Neither finalized nor dismissed by itself."""
    chain, qmp = start(case, auto_finalize=False, auto_dismiss=False)
    qmp.wait("BLOCK_JOB_PENDING")
    verb(qmp, "job-finalize", refuse=False)
    qmp.wait_status("job", "concluded")
    query(qmp)
    verb(qmp, "job-dismiss", refuse=False)
    qmp.wait_status("job", "null")
    qmp.run("block-stream", job_id="job", device="top")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def same_id(case):
    """An id is one job's."""
    chain, qmp = start(case, speed=SLOW)
    other = case.images.chain("under", "other")
    other.add(qmp)
    qmp.refuse("block-stream", job_id="job", device="mid")
    qmp.refuse("block-stream", job_id="job", device="other")
    qmp.refuse("block-commit", job_id="job", device="top", top_node="mid", base_node="base")
    qmp.refuse("block-commit", job_id="job", device="other", top_node="other", base_node="under")
    let_go(qmp)
    qmp.run("block-stream", job_id="job", device="top")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def set_speed(case):
    """Speeds that are refused and speeds that are taken."""
    chain, qmp = start(case, speed=SLOW)
    qmp.refuse("block-job-set-speed", device="job", speed=-1)
    qmp.refuse("block-job-set-speed", device="job", speed=-(2**63))
    qmp.refuse("block-job-set-speed", device="job", speed=2**63)
    qmp.refuse("block-job-set-speed", device="job", speed="fast")
    qmp.refuse("block-job-set-speed", device="job", speed=1.5)
    qmp.refuse("block-job-set-speed", device="job")
    qmp.refuse("block-job-set-speed", device="other", speed=1)
    qmp.run("query-block-jobs")
    qmp.run("block-job-set-speed", device="job", speed=SLOW // 2)
    qmp.run("query-block-jobs")
    qmp.run("block-job-set-speed", device="job", speed=2**63 - 1)
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def set_speed_paused(case):
    """A paused job takes a speed and uses it when it goes on."""
    chain, qmp = start(case, speed=SLOW)
    verb(qmp, "job-pause", refuse=False)
    qmp.wait_status("job", "paused")
    qmp.run("block-job-set-speed", device="job", speed=0)
    qmp.run("query-block-jobs")
    verb(qmp, "job-resume", refuse=False)
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def commit_ready(case):
    """An active commit that is ready: its states, and the verbs that are refused."""
    chain, qmp = start(case, "block-commit")
    qmp.wait("BLOCK_JOB_READY", device="job")
    idle(qmp)
    query(qmp)
    for name in ["job-resume", "job-finalize", "job-dismiss"]:
        verb(qmp, name)
        verb(qmp, "block-" + name)
    qmp.run("block-job-set-speed", device="job", speed=1 << 20)
    verb(qmp, "job-pause", refuse=False)
    qmp.wait_status("job", "standby")
    query(qmp)
    verb(qmp, "job-pause")
    verb(qmp, "job-finalize")
    verb(qmp, "job-dismiss")
    verb(qmp, "job-resume", refuse=False)
    qmp.wait_status("job", "ready")
    verb(qmp, "job-complete", refuse=False)
    finish(qmp)
    qmp.run("quit")
    case.images.same("base.qcow2", chain.expected)


@scenario
def commit_complete_in_standby(case):
    """A paused ready job takes `complete` and carries it out when it goes on."""
    chain, qmp = start(case, "block-commit")
    qmp.wait("BLOCK_JOB_READY", device="job")
    idle(qmp)
    verb(qmp, "job-pause", refuse=False)
    qmp.wait_status("job", "standby")
    verb(qmp, "job-complete", refuse=False)
    query(qmp)
    verb(qmp, "job-resume", refuse=False)
    finish(qmp)
    qmp.run("quit")
    case.images.same("base.qcow2", chain.expected)


@scenario
def commit_complete_twice(case):
    """A second complete while the first one works."""
    chain, qmp = start(case, "block-commit", auto_finalize=False)
    qmp.wait("BLOCK_JOB_READY", device="job")
    verb(qmp, "block-job-complete", refuse=False)
    qmp.wait("BLOCK_JOB_PENDING")
    verb(qmp, "job-complete")
    verb(qmp, "block-job-complete")
    query(qmp)
    verb(qmp, "job-finalize", refuse=False)
    finish(qmp)
    qmp.run("quit")
    case.images.same("base.qcow2", chain.expected)


@scenario
def commit_cancel_ready(case):
    """Cancelling a ready commit: without force it ends as completed, the graph unchanged; with force, and job-cancel, as cancelled."""
    for name, force in (("block-job-cancel", False), ("block-job-cancel", True), ("job-cancel", None)):
        chain, qmp = start(case, "block-commit")
        qmp.wait("BLOCK_JOB_READY", device="job")
        verb(qmp, name, refuse=False, **({"force": force} if force is not None else {}))
        qmp.wait_status("job", "null")
        qmp.run("query-named-block-nodes", flat=True)
        qmp.run("quit")
        case.note(f"{name} {force}: backing", case.images.backing("top.qcow2"))
        chain.reads_as_before()
