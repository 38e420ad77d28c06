"""Filter nodes: throttle, copy-on-read, blkdebug, blkverify; and throttle groups."""

import time

from drive import check, nbd, scenario
from drive.jobs import debug, export, finish


def backed(case, qmp, **filter_):
    """base below top; a filter above top if options are given."""
    chain = case.images.chain("base", "top")
    chain.add(qmp)
    if filter_:
        qmp.run("blockdev-add", node_name="filter", file="top", **filter_)
    return chain


@scenario
def copy_on_read(case):
    """What is read is copied up, and no more."""
    qmp = case.daemon().qmp
    chain = backed(case, qmp, driver="copy-on-read")
    qmp.run("query-named-block-nodes", flat=True)
    address = export(case, qmp, "filter")
    nbd.io(address, "read -P 1 128k 64k", "read 3M 64k")
    qmp.run("quit")
    case.note("map", [extent[:3] for extent in case.images.map("top.qcow2")])
    chain.reads_as_before()


@scenario
def copy_on_read_bottom(case):
    """With a bottom, what lies below it isn't copied."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="copy-on-read", node_name="filter", file="top", bottom="mid")
    qmp.refuse("blockdev-add", driver="copy-on-read", node_name="n", file="top", bottom="nowhere")
    address = export(case, qmp, "filter")
    nbd.io(address, "read -P 1 128k 64k", "read -P 2 700k 64k")
    qmp.refuse("blockdev-del", node_name="mid")
    qmp.run("quit")
    case.note("map", [extent[:3] for extent in case.images.map("top.qcow2")])
    chain.reads_as_before()


@scenario
def copy_on_read_then_stream(case):
    """A stream below a copy-on-read filter that clients use."""
    qmp = case.daemon().qmp
    chain = backed(case, qmp, driver="copy-on-read")
    client = nbd.Client(case, export(case, qmp, "filter"))
    client.do("read -P 1 0 64k")
    qmp.run("block-stream", job_id="job", device="top")
    finish(qmp)
    client.do("write -P 8 64k 64k")
    chain.guest_wrote("write -P 8 64k 64k")
    client.close()
    qmp.run("quit")
    check(case.images.backing("top.qcow2")[0] is None, "the backing link")
    chain.reads_as_before()


@scenario
def copy_on_read_only(case):
    """A copy-on-read filter over a read-only image."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp, read_only=True)
    if qmp.attempt("blockdev-add", driver="copy-on-read", node_name="filter", file="top"):
        qmp.attempt("blockdev-add", driver="copy-on-read", node_name="filter2", file="top", read_only=True)
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def throttle(case):
    """A throttle node holds its group's limits, roughly; limits are changed on the way."""
    path = case.images.raw("disk.raw", "8M", 1)
    qmp = case.daemon("--object", "throttle-group,id=group,x-bps-total=1048576").qmp
    qmp.run("blockdev-add", driver="raw", node_name="disk", file={"driver": "file", "filename": path})
    qmp.run("blockdev-add", driver="throttle", node_name="slow", throttle_group="group", file="disk")
    qmp.run("query-named-block-nodes", flat=True)
    client = nbd.Client(case, export(case, qmp, "slow"))
    began = time.monotonic()
    for step in range(6):
        client.do(f"read -P 1 {step * 256}k 256k")
    spent = time.monotonic() - began
    check(0.8 < spent < 5, f"1.5 MiB at 1 MiB/s took {spent:.2f} s")
    qmp.run("qom-set", path="/objects/group", property="limits", value={"bps-total": 0})
    began = time.monotonic()
    for step in range(6):
        client.do(f"read -P 1 {step}M 1M")
    spent = time.monotonic() - began
    check(spent < 3, f"6 MiB without a limit took {spent:.2f} s")
    qmp.run("qom-set", path="/objects/group", property="limits", value={"iops-total": 10})
    began = time.monotonic()
    for step in range(12):
        client.do(f"read -P 1 {step}k 1k")
    spent = time.monotonic() - began
    check(0.5 < spent < 5, f"12 requests at 10/s took {spent:.2f} s")
    qmp.refuse("object-del", id="group")
    client.close()
    qmp.run("block-export-del", id="export-slow", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-slow")
    qmp.run("blockdev-del", node_name="slow")
    qmp.run("object-del", id="group")
    qmp.refuse("blockdev-add", driver="throttle", node_name="slow", throttle_group="group", file="disk")


@scenario
def throttle_groups(case):
    """object-add, qom-get and qom-set of throttle groups, and what they refuse."""
    qmp = case.daemon().qmp
    qmp.run("object-add", qom_type="throttle-group", id="g", limits={"iops-total": 100, "iops-total-max": 200, "iops-size": 4096})
    qmp.run("qom-get", path="/objects/g", property="limits")
    qmp.run("qom-set", path="/objects/g", property="limits", value={"bps-read": 1000, "bps-write": 2000, "bps-read-max": 5000, "bps-read-max-length": 5})
    qmp.run("qom-get", path="/objects/g", property="limits")
    qmp.run("qom-list", path="/objects")
    qmp.run("qom-get", path="/objects/g", property="x-bps-read")
    qmp.run("qom-get", path="/objects/g", property="type")
    qmp.refuse("qom-set", path="/objects/g", property="limits", value={"bps-total": 1, "bps-read": 1})
    qmp.refuse("qom-set", path="/objects/g", property="limits", value={"bps-total": -1})
    qmp.refuse("qom-set", path="/objects/g", property="limits", value={"bps-read-max": 1, "bps-read": 5})
    qmp.refuse("qom-set", path="/objects/g", property="limits", value={"bps-read-max-length": 0})
    qmp.refuse("qom-set", path="/objects/g", property="limits", value={"nonsense": 1})
    qmp.refuse("qom-set", path="/objects/g", property="limits", value=5)
    qmp.refuse("qom-set", path="/objects/g", property="nonsense", value=5)
    qmp.refuse("qom-get", path="/objects/nowhere", property="limits")
    qmp.refuse("qom-get", path="/objects/g", property="nonsense")
    qmp.run("qom-get", path="/objects/g", property="limits")
    qmp.refuse("object-add", qom_type="throttle-group", id="g")
    qmp.refuse("object-add", qom_type="throttle-group")
    qmp.refuse("object-add", qom_type="throttle-group", id="0g")
    qmp.refuse("object-add", qom_type="nonsense", id="h")
    qmp.refuse("object-add", qom_type="throttle-group", id="h", limits={"bps-total": 1, "bps-read": 1})
    qmp.refuse("object-add", qom_type="throttle-group", id="h", nonsense=1)
    qmp.refuse("object-del", id="nowhere")
    qmp.run("object-del", id="g")
    qmp.refuse("object-del", id="g")
    qmp.refuse("blockdev-add", driver="throttle", node_name="t", throttle_group="g", file={"driver": "null-co"})


@scenario
def throttle_regroup(case):
    """A throttle node is moved to another group with blockdev-reopen."""
    qmp = case.daemon("--object", "throttle-group,id=a", "--object", "throttle-group,id=b").qmp
    qmp.run("blockdev-add", driver="null-co", node_name="null", size=1 << 20)
    qmp.run("blockdev-add", driver="throttle", node_name="t", throttle_group="a", file="null")
    qmp.run("blockdev-reopen", options=[{"driver": "throttle", "node-name": "t", "throttle-group": "b", "file": "null"}])
    qmp.run("object-del", id="a")
    qmp.refuse("object-del", id="b")
    qmp.refuse("blockdev-reopen", options=[{"driver": "throttle", "node-name": "t", "throttle-group": "a", "file": "null"}])


@scenario
def blkdebug(case):
    """Errors on request, for reads, writes, flushes and discards, and their numbers."""
    path = case.images.raw("disk.raw", "1M", 1)
    rules = [
        {"iotype": "read", "errno": 5, "sector": 0},
        {"iotype": "write", "errno": 28, "sector": 256},
        {"iotype": "flush", "errno": 5, "once": True},
        {"iotype": "discard", "errno": 95, "sector": 512},
    ]
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="disk", filename=path)
    qmp.run("blockdev-add", **debug("disk", rules=rules))
    qmp.run("query-named-block-nodes", flat=True)
    address = export(case, qmp, "disk-debug")
    # Each with a connection of its own: the reference hangs up on a client whose read fails.
    case.note("read", nbd.io_fails(address, "read 0 512").splitlines()[0])
    nbd.io(address, "read -P 1 64k 512")
    case.note("errors", nbd.shell(address, ERRORS))
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="n", image="nowhere")
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="n", image="disk", inject_error=[{"event": "nonsense"}])
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="n", image="disk", inject_error=[{"errno": 5}])
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="n", image="disk", align=1000)
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="n")


ERRORS = """
calls = {
    "write": lambda: h.pwrite(b"x" * 512, 131072),
    "write elsewhere": lambda: h.pwrite(b"x" * 512, 65536),
    "flush": lambda: h.flush(),
    "flush again": lambda: h.flush(),
}
for name, call in calls.items():
    try:
        call()
        print(name, "worked")
    except nbd.Error as error:
        print(name, error.errnum)
"""


@scenario
def blkdebug_config(case):
    """Rules from a file, alone and beside others, and files that are no use."""
    path = case.images.raw("disk.raw", "1M", 1)

    def rules(text):
        with open(case.path("rules"), "w", encoding="utf-8") as file:
            file.write(text)

    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="disk", filename=path)
    node = {"driver": "blkdebug", "node_name": "n", "image": "disk", "config": case.path("rules")}
    qmp.refuse("blockdev-add", **node)
    for wrong in (
        "[inject-error]\nevent = none\n",
        'event = "none"\n',
        '[inject-error]\nerrno = "5"\n',
        '[inject-error]\nevent = "nonsense"\n',
        '[nonsense]\nevent = "none"\n',
        '[set-state]\nevent = "none"\nsector = "5"\n',
    ):
        rules(wrong)
        qmp.refuse("blockdev-add", **node)
    rules('# A state that nothing leads to, and one fault\n[inject-error]\nevent = "none"\nstate = "7"\n\n[inject-error]\nevent = "none"\nerrno = "28"\nsector = "256"\niotype = "write"\n')
    qmp.run("blockdev-add", **node)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("blockdev-add", **debug("n", iotype="flush", errno=5))
    address = export(case, qmp, "n-debug")
    nbd.io(address, "read -P 1 0 1M")
    case.note("errors", nbd.shell(address, ERRORS))


@scenario
def blkverify(case):
    """blkverify compares two images and complains when they differ."""
    for name in ("a.raw", "b.raw"):
        case.images.raw(name, "1M", 1)
    qmp = case.daemon().qmp
    files = {name: {"driver": "file", "node-name": name, "filename": case.path(f"{name}.raw")} for name in "ab"}
    qmp.run("blockdev-add", driver="blkverify", node_name="verify", test=files["a"], raw=files["b"])
    qmp.run("query-named-block-nodes", flat=True)
    nbd.io(export(case, qmp, "verify"), "read -P 1 0 64k", "write -P 2 64k 64k", "read -P 2 64k 64k", "flush")
    qmp.run("quit")
    case.images.same("a.raw", "b.raw", form="raw")
    qmp = case.daemon().qmp
    qmp.refuse("blockdev-add", driver="blkverify", node_name="verify", test=files["a"])
    qmp.refuse("blockdev-add", driver="blkverify", node_name="verify", test=files["a"], raw="nowhere")


@scenario
def filters_stacked(case):
    """Filters upon filters, and deleting them from the top."""
    qmp = case.daemon("--object", "throttle-group,id=group").qmp
    chain = backed(case, qmp, driver="copy-on-read")
    qmp.run("blockdev-add", driver="throttle", node_name="outer", throttle_group="group", file="filter")
    qmp.run("blockdev-add", driver="raw", node_name="outermost", file="outer")
    nbd.io(export(case, qmp, "outermost"), "read -P 1 0 64k", "write -P 3 64k 64k")
    chain.guest_wrote("write -P 3 64k 64k")
    for name in ("top", "filter", "outer"):
        qmp.refuse("blockdev-del", node_name=name)
    qmp.run("block-export-del", id="export-outermost", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="export-outermost")
    for name in ("outermost", "outer", "filter", "top"):
        qmp.run("blockdev-del", node_name=name)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def blkdebug_permissions(case):
    """blkdebug as a user of its node that does what nobody above it asks for, or bears less."""
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="null-co", node_name="disk", size=1 << 20)
    qmp.run("blockdev-add", driver="blkdebug", node_name="alone", image="disk", unshare_child_perms=["write"])
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="writer", image="disk", take_child_perms=["write"])
    qmp.run("blockdev-add", driver="blkdebug", node_name="reader", image="disk", take_child_perms=["consistent-read"])
    qmp.run("blockdev-del", node_name="alone")
    qmp.run("blockdev-add", driver="blkdebug", node_name="writer", image="disk", take_child_perms=["write", "resize"])
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="alone", image="disk", unshare_child_perms=["resize"])
    qmp.refuse("blockdev-add", driver="blkdebug", node_name="alone", image="disk", take_child_perms=["nonsense"])
    qmp.run("blockdev-add", driver="blkdebug", node_name="third", image="disk", unshare_child_perms=["write-unchanged"])
