"""What scenarios of jobs have in common."""

from drive import nbd

SLOW = 65536  # bytes a second: the first step is done at once, the next comes seconds later


def finish(qmp, job="job"):
    """Waits until a job is done and gone; gives what it said when it completed."""
    done = qmp.wait("BLOCK_JOB_COMPLETED", device=job)
    qmp.wait_status(job, "null")
    return done


def idle(qmp, job="job"):
    """Waits until a job with a low speed has done its first step and sleeps: what a verb does then is no matter of chance."""

    def sleeps():
        state = qmp.block_job(job)
        return state is None or (state["offset"] > 0 and not state["busy"])

    qmp.poll(sleeps, f"{job} is idle")


def query(qmp):
    """What both queries say about jobs."""
    qmp.run("query-jobs")
    qmp.run("query-block-jobs")


def let_go(qmp, job="job"):
    """Lifts the speed limit and waits for the end."""
    qmp.run("block-job-set-speed", device=job, speed=0)
    return finish(qmp, job)


def debug(name, **rules):
    """Options of a blkdebug node above `name`, whose requests fail as `rules` say. A list of rules may be given as `rules=`."""
    several = rules.pop("rules", None) or [rules]
    return {
        "driver": "blkdebug",
        "node-name": f"{name}-debug",
        "image": name,
        "inject-error": [{"event": "none", **{key.replace("_", "-"): value for key, value in rule.items()}} for rule in several],
    }


def export(case, qmp, node, name=None, writable=True, socket="nbd.sock", start=True, **options):
    """Starts the NBD server (unless it runs) and exports a node; gives the address."""
    path = case.path(socket)
    if start:
        qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    name = name or node
    qmp.run("block-export-add", type="nbd", id=f"export-{name}", node_name=node, name=name, writable=writable, **options)
    return nbd.uri(path, name)
