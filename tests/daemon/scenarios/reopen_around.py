"""blockdev-reopen that is refused, and what goes along with one that isn't: layers above, files below, clients at work."""

import threading

from drive import check, nbd, scenario
from drive.jobs import export, finish


def image(name, backing, **more):
    """All options of a layer of a chain."""
    return {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing, **more}


@scenario
def chain_stays(case):
    """The bottom of a chain can't be opened for reading only, because a filter copies into it: the layers above go on with it, and so does a job."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    address = export(case, qmp, "top")
    qmp.run("blockdev-add", driver="copy-on-read", node_name="copies", file="base")
    export(case, qmp, "copies", writable=False, start=False)
    qmp.refuse("blockdev-reopen", options=[image("base", None, **{"read-only": True})])
    nbd.io(address, "write -P 9 0 64k")
    chain.guest_wrote("write -P 9 0 64k")
    qmp.run("block-stream", job_id="job", device="top", base_node="base")
    finish(qmp)
    qmp.run("quit")
    check(case.images.backing("top.qcow2")[0] == chain.file("base"), "the link")
    chain.reads_as_before()


@scenario
def all_or_none(case):
    """Of several nodes the last can't be opened in the wanted way: the others are as they were."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    export(case, qmp, "top")
    spare = case.images.qcow2("spare.qcow2")
    qmp.run("blockdev-add", driver="qcow2", node_name="spare", file={"driver": "file", "filename": spare})

    def state():
        nodes = {node["node-name"]: node for node in qmp.quiet("query-named-block-nodes", flat=True)}
        return {name: (node["ro"], node["cache"]["no-flush"], node["backing_file_depth"]) for name, node in nodes.items() if name in chain.names}

    before = state()
    read_only = {"read-only": True}
    refused = image("top", "mid", **read_only)
    qmp.refuse("blockdev-reopen", options=[image("mid", "base", **read_only), refused])
    qmp.refuse("blockdev-reopen", options=[image("mid", None), refused])
    qmp.refuse("blockdev-reopen", options=[image("base", None, cache={"no-flush": True}), image("mid", "base", cache={"no-flush": True}), refused])
    qmp.refuse("blockdev-reopen", options=[image("mid", "spare"), image("mid", "base", nonsense=1)])
    check(state() == before, f"{before} became {state()}")
    qmp.run("block-stream", job_id="job", device="top", base_node="base")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def options_stay(case):
    """What a node can't be without can't be left out when it gets other options, and an image can be opened for writing afterwards."""
    path = case.images.raw("disk.raw", "1M", 1)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="file", filename=path, read_only=True)
    qmp.refuse("blockdev-reopen", options=[{"driver": "file", "node-name": "file"}])
    qmp.refuse("blockdev-reopen", options=[{"driver": "file", "node-name": "file", "read-only": False}])
    qmp.run("blockdev-reopen", options=[{"driver": "file", "node-name": "file", "filename": path, "read-only": False}])
    nbd.io(export(case, qmp, "file"), "write -P 2 0 1M")
    qmp.run("quit")


@scenario
def under_writes(case):
    """While a client writes, its disk can't be opened for reading only, and no request notices that somebody tried."""
    case.images.qcow2("disk.qcow2")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="disk-file", filename=case.path("disk.qcow2"))
    qmp.run("blockdev-add", **image("disk", None))
    address = export(case, qmp, "disk")
    failed = []

    def write():
        try:
            nbd.io(address, *[f"write -P {at % 250 + 1} {at % 64 * 64}k 64k" for at in range(600)])
        except Exception as failure:
            failed.append([line for line in str(failure).splitlines() if "failed" in line])

    client = threading.Thread(target=write)
    client.start()
    for _ in range(40):
        qmp.refuse("blockdev-reopen", options=[image("disk", None, **{"read-only": True})])
    client.join()
    check(not failed, f"{failed}")
    qmp.run("quit")
    case.images.check("disk.qcow2")


@scenario
def with_its_file(case):
    """An image that was opened for reading only, with its file in place, directly and below a filter: the file goes along."""
    qmp = case.daemon().qmp
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={"iops-total": 100000})
    for name in ("plain", "filtered"):
        path = case.images.qcow2(f"{name}.qcow2", "1M")
        file = {"driver": "file", "filename": path}
        if name == "filtered":
            file = {"driver": "throttle", "throttle-group": "group", "file": file}
        options = {"driver": "qcow2", "node-name": name, "file": file, "backing": None}
        qmp.run("blockdev-add", **options, read_only=True)
        qmp.run("blockdev-reopen", options=[{**options, "read-only": False}])
        nbd.io(export(case, qmp, name, start=name == "plain"), "write -P 1 0 1M")
        qmp.run("block-export-del", id=f"export-{name}")
        qmp.run("blockdev-reopen", options=[{**options, "read-only": True}])
        qmp.refuse("block-export-add", type="nbd", id="again", node_name=name, writable=True)
    qmp.run("quit")
    for name in ("plain", "filtered"):
        case.images.check(f"{name}.qcow2")


@scenario
def commit_through_a_filter(case):
    """A base that is open for reading only, whose file is below a filter: a commit opens all of it for writing."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={"iops-total": 100000})
    file = {"driver": "throttle", "throttle-group": "group", "file": {"driver": "file", "filename": chain.file("base")}}
    qmp.run("blockdev-add", driver="qcow2", node_name="base", file=file, backing=None, read_only=True)
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": chain.file("top")}, backing="base")
    qmp.run("block-commit", job_id="job", device="top")
    qmp.wait("BLOCK_JOB_READY", device="job")
    qmp.run("job-complete", id="job")
    finish(qmp)
    qmp.run("quit")
    chain.reads_as_before("base")


@scenario
def file_stays(case):
    """A file that is described with its image again can't be another one, or a filter that wasn't there."""
    path = case.images.qcow2("disk.qcow2")
    other = case.images.qcow2("other.qcow2")
    qmp = case.daemon().qmp
    file = {"driver": "file", "filename": path}

    def options(file):
        return {"driver": "qcow2", "node-name": "disk", "file": file, "backing": None}

    qmp.run("blockdev-add", **options(file))
    qmp.run("blockdev-reopen", options=[options(file)])
    qmp.refuse("blockdev-reopen", options=[options({"driver": "file", "filename": other})])
    qmp.refuse("blockdev-reopen", options=[options({"driver": "blkdebug", "image": file})])
    qmp.refuse("blockdev-reopen", options=[options({"driver": "file"})])
    qmp.run("quit")
