"""Internal snapshots: taken and deleted while clients use the disk."""

from drive import check, nbd, scenario
from drive.jobs import export


def disk(case, name="disk", size="4M", options=None, **more):
    """A daemon with one qcow2 disk; gives its monitor."""
    case.images.qcow2(f"{name}.qcow2", size, options=options, writes=["write -P 1 0 1M"])
    qmp = case.daemon().qmp
    add(case, qmp, name, **more)
    return qmp


def add(case, qmp, name, driver="qcow2", **more):
    qmp.run("blockdev-add", driver=driver, node_name=name, file={"driver": "file", "node-name": f"{name}-file", "filename": case.path(f"{name}.qcow2")}, **more)


def take(qmp, name, device="disk"):
    qmp.run("blockdev-snapshot-internal-sync", device=device, name=name)


def mask(case):
    """When it was, and how long a machine had been running then."""
    case.transcript.mask("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")


def holds(case, image, snapshot, *reads):
    """Fails unless a snapshot reads like this."""
    nbd.tool("qemu-img", "convert", "-l", f"snapshot.name={snapshot}", "-O", "raw", case.path(image), case.path(f"{snapshot}.raw"))
    case.images.write(case.path(f"{snapshot}.raw"), *reads, form="raw")


@scenario
def life(case):
    """Three are taken between a client's changes, one is deleted, and the client goes on."""
    mask(case)
    qmp = disk(case, discard="unmap")
    client = nbd.Client(case, export(case, qmp, "disk"))
    take(qmp, "one")
    client.do("write -P 2 512k 1M")
    take(qmp, "two")
    client.do("write -z 0 128k")
    client.do("discard 1M 256k")
    client.do("write -P 3 3M 64k")
    take(qmp, "three")
    qmp.run("query-named-block-nodes")
    client.do("write -P 4 3M 64k")
    qmp.run("blockdev-snapshot-delete-internal-sync", device="disk", name="two")
    client.do("read -P 4 3M 64k")
    client.do("read -P 0 0 128k")
    client.do("write -P 5 0 64k")
    client.close()
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    case.images.check("disk.qcow2")
    holds(case, "disk.qcow2", "one", "read -P 1 0 1M", "read -P 0 1M 3M")
    holds(case, "disk.qcow2", "three", "read -P 0 0 128k", "read -P 2 512k 512k", "read -P 3 3M 64k")
    case.images.write(case.path("disk.qcow2"), "read -P 5 0 64k", "read -P 4 3M 64k", "read -P 1 128k 384k")


@scenario
def opened_again(case):
    """A daemon that comes later lists and deletes what another one took; nothing leaks."""
    mask(case)
    qmp = disk(case, options="cluster_size=4k,refcount_bits=8")
    take(qmp, "one")
    nbd.io(export(case, qmp, "disk"), "write -P 2 0 64k")
    take(qmp, "two")
    qmp.run("quit")
    case.images.check("disk.qcow2")
    second = case.daemon().qmp
    add(case, second, "disk")
    second.run("query-named-block-nodes")
    second.run("blockdev-snapshot-delete-internal-sync", device="disk", id="1")
    take(second, "three")
    second.run("blockdev-snapshot-delete-internal-sync", device="disk", id="2", name="two")
    second.run("blockdev-snapshot-delete-internal-sync", device="disk", name="three")
    second.run("quit")
    case.images.check("disk.qcow2")
    case.images.write(case.path("disk.qcow2"), "read -P 2 0 64k", "read -P 1 64k 960k")


@scenario
def by_others(case):
    """Taken by qemu-img, deleted by the daemon, and the other way round."""
    mask(case)
    case.images.qcow2("disk.qcow2", "4M", options="extended_l2=on", writes=["write -P 1 0 1M", "write -P 2 2M 3k"])
    path = case.path("disk.qcow2")
    nbd.tool("qemu-img", "snapshot", "-c", "theirs", path)
    qmp = case.daemon().qmp
    add(case, qmp, "disk")
    nbd.io(export(case, qmp, "disk"), "write -P 3 2M 2k")
    take(qmp, "ours")
    qmp.run("blockdev-snapshot-delete-internal-sync", device="disk", name="theirs")
    qmp.run("quit")
    case.images.check("disk.qcow2")
    nbd.tool("qemu-img", "snapshot", "-a", "ours", path)
    nbd.tool("qemu-img", "snapshot", "-d", "ours", path)
    case.images.check("disk.qcow2")
    case.images.write(path, "read -P 3 2M 2k", "read -P 2 2050k 1k")


@scenario
def refusals(case):
    """What can't be taken, and what isn't there."""
    mask(case)
    qmp = disk(case)
    case.images.raw("raw.qcow2", "1M")
    add(case, qmp, "raw", driver="raw")
    case.images.qcow2("still.qcow2", "1M")
    add(case, qmp, "still", read_only=True)
    take(qmp, "one")

    def refuse(**arguments):
        qmp.refuse("blockdev-snapshot-internal-sync", **arguments)

    def no_delete(**arguments):
        qmp.refuse("blockdev-snapshot-delete-internal-sync", **arguments)

    refuse(device="disk")
    refuse(name="x")
    refuse(device="disk", name="one")
    refuse(device="disk", name="")
    refuse(device="nowhere", name="x")
    refuse(device="raw", name="x")
    refuse(device="still", name="x")
    no_delete(device="disk")
    no_delete(device="disk", name="nothing")
    no_delete(device="disk", id="9")
    no_delete(device="disk", id="1", name="two")
    no_delete(device="nowhere", name="one")
    no_delete(device="raw", name="one")
    qmp.run("object-add", qom_type="throttle-group", id="group", limits={})
    qmp.run("blockdev-add", driver="throttle", node_name="limited", throttle_group="group", file="disk")
    refuse(device="disk", name="below")
    take(qmp, "above", device="limited")
    qmp.run("quit")
    case.images.check("disk.qcow2")


@scenario
def transaction(case):
    """Two disks at once, and what a transaction takes back."""
    mask(case)
    qmp = disk(case)
    case.images.qcow2("other.qcow2", "1M", writes=["write -P 7 0 1M"])
    add(case, qmp, "other")

    def action(device, name):
        return {"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": name}}

    qmp.run("transaction", actions=[action("disk", "both"), action("other", "both")])
    qmp.refuse("transaction", actions=[action("disk", "undone"), {"type": "abort", "data": {}}])
    qmp.refuse("transaction", actions=[action("disk", "twice"), action("disk", "twice")])
    qmp.refuse("transaction", actions=[action("disk", "first"), action("other", "both")])
    qmp.refuse("transaction", actions=[action("disk", "x")], properties={"completion-mode": "grouped"})
    nbd.io(export(case, qmp, "disk"), "write -P 2 0 64k")
    qmp.run("query-named-block-nodes")
    qmp.run("quit")
    for name in ("disk.qcow2", "other.qcow2"):
        case.images.check(name)
        check([one["name"] for one in case.images.info(name)["snapshots"]] == ["both"], f"the snapshots of {name}")
    holds(case, "disk.qcow2", "both", "read -P 1 0 1M")


@scenario
def of_iothread(case):
    """x-blockdev-set-iothread: what is and what isn't there."""
    qmp = disk(case)
    qmp.run("object-add", qom_type="iothread", id="thread")
    qmp.run("x-blockdev-set-iothread", node_name="disk", iothread="thread")
    qmp.run("x-blockdev-set-iothread", node_name="disk", iothread=None)
    qmp.refuse("x-blockdev-set-iothread", node_name="disk", iothread="nothing")
    qmp.refuse("x-blockdev-set-iothread", node_name="nowhere", iothread="thread")
    qmp.refuse("x-blockdev-set-iothread", node_name="disk")
