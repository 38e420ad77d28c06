"""Inactive nodes: left to somebody else for a while, and read anew when they are active again."""

from drive import check, nbd, scenario
from drive.images import tool
from drive.jobs import export


def show(qmp):
    """Which nodes are active."""
    return {node["node-name"]: node["active"] for node in qmp.run("query-named-block-nodes", flat=True)}


def disk(case, name, **more):
    """A qcow2 disk of 1M, open under its name."""
    case.images.qcow2(f"{name}.qcow2", "1M", writes=["write -P 1 0 1M"])
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "node-name": f"{name}-file", "filename": case.path(f"{name}.qcow2")}, **more}


@scenario
def opened_inactive(case):
    """`active` off: the file goes along, another process may write to it, and what it wrote is seen afterwards."""
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", **disk(case, "disk", active=False))
    show(qmp)
    case.images.write(case.path("disk.qcow2"), "write -P 2 0 512k")
    tool("qemu-img", "resize", "-q", "-f", "qcow2", case.path("disk.qcow2"), "2M")
    qmp.refuse("block_resize", node_name="disk", size=4 << 20)
    qmp.run("blockdev-set-active", node_name="disk", active=True)
    show(qmp)
    address = export(case, qmp, "disk")
    nbd.io(address, "read -P 2 0 512k", "read -P 1 512k 512k", "read -P 0 1M 1M", "write -P 3 1M 1M")
    qmp.run("quit")
    case.images.write(case.path("disk.qcow2"), "read -P 2 0 512k", "read -P 3 1M 1M")
    case.images.check("disk.qcow2")


@scenario
def handed_over(case):
    """A disk is written, made inactive, changed by another process, and made active again; what was written is in the file in time."""
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", **disk(case, "disk"))
    qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": case.path("nbd.sock")}})
    qmp.run("block-export-add", type="nbd", id="export", node_name="disk", name="disk", writable=True)
    address = nbd.uri(case.path("nbd.sock"), "disk")
    nbd.io(address, "write -P 2 0 256k", "discard 256k 256k")
    qmp.refuse("blockdev-set-active", node_name="disk", active=False)
    qmp.run("block-export-del", id="export")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export")
    qmp.refuse("blockdev-set-active", node_name="disk-file", active=False)
    qmp.run("blockdev-set-active", node_name="disk", active=False)
    show(qmp)
    case.images.write(case.path("disk.qcow2"), "read -P 2 0 256k", "read -P 1 512k 512k", "write -P 4 256k 512k")
    case.images.check("disk.qcow2")
    qmp.run("block-export-add", type="nbd", id="export", node_name="disk", name="disk", writable=True)
    show(qmp)
    nbd.io(address, "read -P 2 0 256k", "read -P 4 256k 512k", "read -P 1 768k 256k", "write -P 5 0 64k")
    qmp.run("quit")
    case.images.write(case.path("disk.qcow2"), "read -P 5 0 64k", "read -P 4 256k 512k")
    case.images.check("disk.qcow2")


@scenario
def export_that_waits(case):
    """An export that allows it stays while its disk is inactive: it can be read then, not written."""
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", **disk(case, "disk"))
    address = export(case, qmp, "disk", **{"allow-inactive": True})
    client = nbd.Client(case, address)
    client.do("write -P 2 0 64k")
    qmp.run("blockdev-set-active", node_name="disk", active=False)
    show(qmp)
    nbd.io(address, "read -P 2 0 64k")
    nbd.io_fails(address, "write -P 3 0 64k")
    nbd.io_fails(address, "write -z 0 64k")
    client.do("read -P 2 0 64k")
    qmp.run("blockdev-set-active", active=True)
    client.do("write -P 4 0 64k")
    client.close()
    nbd.io(address, "read -P 4 0 64k")
    qmp.run("quit")
    case.images.check("disk.qcow2")


@scenario
def graph(case):
    """What may stand on an inactive node, and what a job may do with one."""
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", **disk(case, "disk", active=False))
    qmp.refuse("blockdev-add", driver="raw", node_name="above", file="disk")
    qmp.refuse("blockdev-add", driver="raw", node_name="above", file="disk", active=True)
    qmp.run("blockdev-add", driver="raw", node_name="above", file="disk", active=False)
    qmp.run("blockdev-del", node_name="above")
    qmp.run("blockdev-add", **disk(case, "over", backing=None))
    qmp.run("blockdev-snapshot", node="disk", overlay="over")
    check(show(qmp)["over"] is False, "an overlay of an inactive disk is inactive")
    qmp.run("blockdev-add", driver="null-co", node_name="null", size=1 << 20)
    qmp.refuse("block-stream", job_id="job", device="over", filter_node_name="above")
    qmp.refuse("block-commit", job_id="job", device="over", filter_node_name="above")
    qmp.refuse("blockdev-mirror", job_id="job", device="over", target="null", sync="full", filter_node_name="above")
    qmp.refuse("blockdev-mirror", job_id="job", device="null", target="over", sync="full", filter_node_name="above")
    qmp.run("blockdev-set-active", node_name="over", active=True)
    show(qmp)
    qmp.run("blockdev-set-active", active=False)
    show(qmp)
    qmp.run("blockdev-set-active", active=True)
    qmp.run("quit")
