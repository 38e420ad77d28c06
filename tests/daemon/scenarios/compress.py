"""Compressed clusters: backups with `compress`, and the filter of that name."""

import json

from drive import check, nbd, scenario
from drive.images import tool
from drive.jobs import SLOW, export, finish, idle, let_go

from .backup import copy, disk

MIB = 1 << 20


def packed(case, name):
    """Fails unless most of an image is compressed, and it is in order. Gives how many clusters are."""
    case.images.check(name)
    found = json.loads(tool("qemu-img", "check", "--output=json", "-f", "qcow2", case.path(name)))
    clusters = found.get("compressed-clusters", 0)
    check(clusters * 2 > found["allocated-clusters"], f"{clusters} of {found['allocated-clusters']} clusters of {name} are compressed")
    return clusters


@scenario
def backup(case):
    """A backup whose target is compressed; a client writes meanwhile, and the copy is of the moment at which it began."""
    chain, qmp = disk(case)
    copy(case, qmp)
    address = export(case, qmp, "disk")
    qmp.run("blockdev-backup", job_id="job", device="disk", target="copy", sync="full", compress=True, speed=SLOW)
    idle(qmp)
    case.transcript.mask("offset", "current-progress")
    qmp.run("query-block-jobs")
    nbd.io(address, "write -P 50 3M 64k", "write -P 51 2000000 1000", "write -z 700k 200k", "flush")
    nbd.io(address, "read -P 50 3M 64k", "read -P 51 2000000 1000", "read -P 0 700k 200k")
    let_go(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.note("compressed", packed(case, "copy.qcow2"))


@scenario
def kinds(case):
    """Targets with other clusters, zstd, subclusters, version 2; one that lies on a throttle node."""
    chain, qmp = disk(case)
    for name, options in (
        ("zstd", "compression_type=zstd"),
        ("small", "cluster_size=4k"),
        ("large", "cluster_size=1M"),
        ("units", "extended_l2=on"),
        ("old", "compat=0.10"),
        ("counts", "refcount_bits=8"),
    ):
        case.images.qcow2(f"{name}.qcow2", "4M", options=options)
        qmp.run("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": case.path(f"{name}.qcow2")})
        qmp.run("blockdev-backup", job_id="job", device="disk", target=name, sync="full", compress=True)
        finish(qmp)
    qmp.run("quit")
    for name in ("zstd", "small", "large", "units", "old", "counts"):
        case.images.same(f"{name}.qcow2", chain.expected)
        case.note(name, packed(case, f"{name}.qcow2"))


@scenario
def size(case):
    """A compressed copy takes about as much as one that qemu-img has made."""
    path = case.path("source.raw")
    words = b" ".join(b"%d bottles of beer on the wall, %x" % (n, n * 7919 % 65521) for n in range(200000))
    with open(path, "wb") as out:
        out.write(words[: 4 * MIB].ljust(4 * MIB, b"."))
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="raw", node_name="source", file={"driver": "file", "filename": path})
    copy(case, qmp)
    qmp.run("blockdev-backup", job_id="job", device="source", target="copy", sync="full", compress=True)
    finish(qmp)
    qmp.run("quit")
    tool("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", path, case.path("theirs.qcow2"))
    case.images.same("copy.qcow2", "source.raw")
    packed(case, "copy.qcow2")
    ours, theirs = (case.images.info(name)["actual-size"] for name in ("copy.qcow2", "theirs.qcow2"))
    check(ours < theirs * 1.1 + 2 * 65536, f"{ours} bytes, where qemu-img needs {theirs}")


@scenario
def drive(case):
    """drive-backup, into an image that it makes."""
    chain, qmp = disk(case)
    qmp.run("drive-backup", job_id="job", device="disk", target=case.path("copy.qcow2"), format="qcow2", sync="full", compress=True)
    finish(qmp)
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    case.note("compressed", packed(case, "copy.qcow2"))


@scenario
def transaction(case):
    """As an action of a transaction."""
    chain, qmp = disk(case)
    copy(case, qmp)
    data = {"job-id": "one", "device": "disk", "target": "copy", "sync": "full", "compress": True}
    qmp.run("transaction", actions=[{"type": "blockdev-backup", "data": data}])
    finish(qmp, "one")
    qmp.run("quit")
    case.images.same("copy.qcow2", chain.expected)
    packed(case, "copy.qcow2")


@scenario
def refused(case):
    """Targets that can't have compressed clusters, and filters over them."""
    _chain, qmp = disk(case)
    raw = case.images.raw("copy.raw", "4M", fill=9)
    qmp.run("blockdev-add", driver="raw", node_name="raw", file={"driver": "file", "node-name": "raw-file", "filename": raw})
    qmp.refuse("blockdev-backup", job_id="job", device="disk", target="raw", sync="full", compress=True)
    qmp.refuse("drive-backup", job_id="job", device="disk", target=case.path("new.raw"), format="raw", sync="full", compress=True)
    qmp.refuse("blockdev-add", driver="compress", node_name="filter", file="raw")
    qmp.refuse("blockdev-add", driver="compress", node_name="filter", file="raw-file")
    qmp.refuse("blockdev-add", driver="compress", node_name="filter", file="nowhere")
    qmp.refuse("blockdev-add", driver="compress", node_name="filter")
    qmp.refuse("blockdev-add", driver="compress", node_name="filter", file="disk", level=9)
    qmp.run("query-jobs")
    qmp.run("quit")
    case.images.same("copy.raw", case.images.raw("nine.raw", "4M", fill=9), form="raw")


@scenario
def data_file(case):
    """An external data file has its clusters where the disk has them."""
    _chain, qmp = disk(case)
    case.images.qcow2("apart.qcow2", "4M", options=f"data_file={case.path('apart.data')}")
    qmp.run("blockdev-add", driver="file", node_name="data", filename=case.path("apart.data"))
    qmp.run("blockdev-add", driver="qcow2", node_name="apart", file={"driver": "file", "filename": case.path("apart.qcow2")}, data_file="data")
    if qmp.attempt("blockdev-backup", job_id="job", device="disk", target="apart", sync="full", compress=True):
        finish(qmp)
    qmp.attempt("blockdev-add", driver="compress", node_name="filter", file="apart")


@scenario
def through_filter(case):
    """What a client writes through the filter is compressed; clusters that it writes in part, too."""
    qmp = case.daemon().qmp
    case.images.qcow2("disk.qcow2", "4M")
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file={"driver": "file", "filename": case.path("disk.qcow2")})
    qmp.run("blockdev-add", driver="compress", node_name="filter", file="disk")
    qmp.run("query-named-block-nodes", flat=True)
    address = export(case, qmp, "filter")
    writes = ["write -P 1 0 1M", "write -P 2 1100k 100", "write -P 3 2000000 300000", "write -z 3M 64k", "discard 3136k 64k"]
    reads = ["read -P 1 0 1M", "read -P 2 1100k 100", "read -P 0 1101k 1000", "read -P 3 2000000 300000", "read -P 0 3M 1M"]
    nbd.io(address, *writes, *reads, "flush")
    qmp.refuse("blockdev-del", node_name="disk")
    qmp.refuse("blockdev-reopen", options=[{"driver": "compress", "node-name": "filter", "file": "disk"}])
    qmp.run("quit")
    out = tool("qemu-io", "-f", "qcow2", case.path("disk.qcow2"), script="\n".join(reads) + "\n")
    check("failed" not in out, out)
    packed(case, "disk.qcow2")


@scenario
def over_it(case):
    """Writing through the filter what is there already: whoever can't do that fails the write, and nothing is lost."""
    qmp = case.daemon().qmp
    case.images.qcow2("disk.qcow2", "4M", writes=["write -P 9 2M 1M"])
    qmp.run("blockdev-add", driver="qcow2", node_name="disk", file={"driver": "file", "filename": case.path("disk.qcow2")})
    qmp.run("blockdev-add", driver="compress", node_name="filter", file="disk")
    address = export(case, qmp, "filter")
    nbd.io(address, "write -P 1 0 1M", "flush")
    overwrites = {"compressed": "write -P 2 64k 64k", "a part": "write -P 3 200k 1k", "plain": "write -P 4 2M 128k"}
    outcomes = {}
    for what, command in overwrites.items():
        out = tool("qemu-io", "-f", "raw", address, script=f"{command}\n", status=None)
        outcomes[what] = "failed" not in out
    case.note("taken", outcomes)
    same = {"compressed": ("64k 64k", 1, 2), "a part": ("200k 1k", 1, 3), "plain": ("2M 128k", 9, 4)}
    reads = [f"read -P {new if outcomes[what] else old} {where}" for what, (where, old, new) in same.items()]
    reads += ["read -P 1 128k 72k", "read -P 1 201k 800k", "read -P 9 2176k 800k"]
    nbd.io(address, *reads)
    qmp.run("quit")
    out = tool("qemu-io", "-f", "qcow2", case.path("disk.qcow2"), script="\n".join(reads) + "\n")
    check("failed" not in out, out)
    case.images.check("disk.qcow2")


@scenario
def read_only(case):
    """Over a read-only image."""
    chain = case.images.chain("base")
    qmp = case.daemon().qmp
    chain.add(qmp, read_only=True)
    qmp.attempt("blockdev-add", driver="compress", node_name="filter", file="base")
    qmp.attempt("blockdev-add", driver="compress", node_name="filter2", file="base", read_only=True)
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def on_the_command_line(case):
    """--blockdev compress, with its child inline."""
    case.images.qcow2("disk.qcow2", "1M")
    qmp = case.daemon("--blockdev", f"driver=compress,node-name=filter,file.driver=qcow2,file.file.driver=file,file.file.filename={case.path('disk.qcow2')}").qmp
    address = export(case, qmp, "filter")
    nbd.io(address, "write -P 1 0 1M", "flush", "read -P 1 0 1M")
    qmp.run("quit")
    case.note("compressed", packed(case, "disk.qcow2"))
