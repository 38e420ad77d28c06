"""blockdev-reopen: definitions that reach down to the file, other files and backings, what stays as it was opened, jobs in the way."""

from drive import check, nbd, scenario
from drive.jobs import SLOW, export, finish, idle, let_go


def image(case, name, **more):
    """All options of a qcow2 image and of its file, which is defined in place."""
    file = {"driver": "file", "node-name": f"{name}-file", "filename": case.path(f"{name}.qcow2")}
    return {"driver": "qcow2", "node-name": name, "file": file, **more}


def again(qmp, *options):
    """Opens nodes again, all by one command."""
    qmp.run("blockdev-reopen", options=list(options))


def never(qmp, *options):
    """The same, which must be refused."""
    qmp.refuse("blockdev-reopen", options=list(options))


def show(qmp):
    """All nodes."""
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def nested(case):
    """A definition with a file and a backing in it: what may be said of them."""
    case.images.qcow2("low.qcow2", "1M", writes=["write -P 1 0 1M"])
    case.images.qcow2("disk.qcow2", None, backing="low.qcow2", writes=["write -P 2 0 128k"])
    case.images.raw("other.raw")
    qmp = case.daemon().qmp
    disk = image(case, "disk", backing=image(case, "low"))
    qmp.run("blockdev-add", **disk)
    again(qmp, disk)
    show(qmp)
    again(qmp, {**disk, "read-only": True})
    show(qmp)
    again(qmp, disk)
    again(qmp, {**disk, "backing": "low", "file": "disk-file"})
    show(qmp)
    never(qmp, {**disk, "detect-zeroes": "unmap"})
    again(qmp, {**disk, "cache": {"no-flush": True}, "discard": "unmap", "detect-zeroes": "unmap"})
    show(qmp)
    again(qmp, disk)
    show(qmp)
    never(qmp, {**disk, "force-share": True})
    never(qmp, {**disk, "backing": {**disk["backing"], "driver": "raw"}})
    never(qmp, {**disk, "backing": {**disk["backing"], "node-name": "else"}})
    for changed in ({"filename": case.path("other.raw")}, {"aio": "threads"}, {"locking": "off"}, {"driver": "host_device"}, {"node-name": "else"}):
        never(qmp, {**disk, "file": {**disk["file"], **changed}})
    never(qmp, {**disk, "l2-cache-entry-size": 3000})
    never(qmp, {**disk, "l2-cache-size": 2 << 20, "cache-size": 1 << 20})
    again(qmp, {**disk, "lazy-refcounts": True, "pass-discard-request": False})
    without = {key: value for key, value in disk.items() if key != "backing"}
    never(qmp, without)
    never(qmp, disk, {**image(case, "low"), "driver": "raw"})
    show(qmp)
    address = export(case, qmp, "disk")
    nbd.io(address, "read -P 2 0 128k", "read -P 1 128k 128k", "write -P 3 512k 64k")
    qmp.run("quit")
    case.images.check("disk.qcow2")


@scenario
def defaults(case):
    """What is left out has its default again, or must not be left out."""
    case.images.qcow2("disk.qcow2", "1M")
    qmp = case.daemon().qmp
    file = {"driver": "file", "node-name": "file", "filename": case.path("disk.qcow2"), "locking": "off", "x-check-cache-dropped": True}
    disk = {"driver": "qcow2", "node-name": "disk", "file": file, "detect-zeroes": "on", "cache": {"no-flush": True}}
    qmp.run("blockdev-add", **disk)
    without = {key: value for key, value in file.items() if key not in ("locking", "x-check-cache-dropped")}
    never(qmp, {"driver": "qcow2", "node-name": "disk", "file": without})
    again(qmp, {"driver": "qcow2", "node-name": "disk", "file": {**without, "locking": "off"}})
    show(qmp)
    qmp.run("blockdev-add", driver="null-co", node_name="null", size=1 << 20)
    again(qmp, {"driver": "null-co", "node-name": "null", "size": 1 << 20})
    never(qmp, {"driver": "null-co", "node-name": "null"})
    never(qmp, {"driver": "null-co", "node-name": "null", "size": 2 << 20})
    qmp.run("blockdev-add", driver="blkdebug", node_name="debug", image="disk", align=4096)
    again(qmp, {"driver": "blkdebug", "node-name": "debug", "image": "disk", "align": 4096})
    never(qmp, {"driver": "blkdebug", "node-name": "debug", "image": "null", "align": 4096})
    never(qmp, {"driver": "blkdebug", "node-name": "debug", "image": "disk", "align": 8192})
    never(qmp, {"driver": "blkdebug", "node-name": "debug", "image": "disk"})
    qmp.run("blockdev-add", driver="copy-on-read", node_name="cor", file="null")
    never(qmp, {"driver": "copy-on-read", "node-name": "cor", "file": "null"})


@scenario
def window(case):
    """The part of a file that a raw node shows, under a client."""
    path = case.images.raw("disk.raw", "2M", 1)
    case.images.write(path, "write -P 2 1M 1M", form="raw")
    qmp = case.daemon().qmp
    raw = {"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": path}}
    qmp.run("blockdev-add", **raw, size=1 << 20)
    address = export(case, qmp, "disk")
    nbd.io(address, "read -P 1 0 1M")
    again(qmp, {**raw, "offset": 1 << 20, "size": 1 << 20})
    nbd.io(address, "read -P 2 0 1M")
    again(qmp, {**raw, "offset": 512 << 10, "size": 1 << 20})
    nbd.io(address, "read -P 1 0 512k", "read -P 2 512k 512k")
    show(qmp)


@scenario
def other_file(case):
    """An image gets another file, a filter is put in between and taken out, two images swap their files; clients stay."""
    for name, fill in (("one", 1), ("two", 2)):
        case.images.qcow2(f"{name}.qcow2", "1M", writes=[f"write -P {fill} 0 1M"])
    qmp = case.daemon().qmp
    qmp.run("object-add", qom_type="throttle-group", id="group")
    options = {name: image(case, name) for name in ("one", "two")}
    for name in options:
        qmp.run("blockdev-add", **options[name]["file"])
        qmp.run("blockdev-add", **{**options[name], "file": f"{name}-file"})
    qmp.run("blockdev-add", driver="raw", node_name="above", file="one")
    address = {"one": export(case, qmp, "above", writable=True), "two": export(case, qmp, "two", start=False)}
    never(qmp, {**options["one"], "file": "two-file"})
    never(qmp, {**options["one"], "file": "nowhere"})
    never(qmp, {**options["one"], "file": "above"})
    qmp.run("blockdev-add", driver="throttle", node_name="throttle", throttle_group="group", file="one-file")
    again(qmp, {**options["one"], "file": "throttle"})
    nbd.io(address["one"], "read -P 1 0 1M", "write -P 3 0 64k")
    again(qmp, {**options["one"], "file": "one-file"})
    nbd.io(address["one"], "read -P 3 0 64k", "write -P 4 64k 64k")
    again(qmp, {**options["one"], "file": "two-file"}, {**options["two"], "file": "one-file"})
    show(qmp)
    nbd.io(address["one"], "read -P 2 0 1M", "write -P 5 0 64k")
    nbd.io(address["two"], "read -P 3 0 64k", "read -P 4 64k 64k", "read -P 1 128k 896k", "write -P 6 0 64k")
    again(qmp, {**options["one"], "file": "one-file"}, {**options["two"], "file": "two-file"})
    nbd.io(address["one"], "read -P 6 0 64k", "read -P 4 64k 64k")
    nbd.io(address["two"], "read -P 5 0 64k", "read -P 2 64k 960k")
    # A filter gets another node to be on.
    filtered = {"driver": "throttle", "node-name": "throttle", "throttle-group": "group"}
    qmp.run("blockdev-add", driver="null-co", node_name="zeroes", size=1 << 20, read_zeroes=True)
    again(qmp, {**filtered, "file": "zeroes"})
    show(qmp)
    nbd.io(export(case, qmp, "throttle", start=False), "read -P 0 0 1M")
    never(qmp, {**filtered, "file": "zeroes", "throttle-group": "none"})
    qmp.run("quit")
    for name in options:
        case.images.check(f"{name}.qcow2")


@scenario
def not_an_image(case):
    """A file that holds no image: nothing has changed, for none of the nodes."""
    for name, fill in (("one", 1), ("two", 2)):
        case.images.qcow2(f"{name}.qcow2", "1M", writes=[f"write -P {fill} 0 1M"])
    case.images.raw("nothing.raw", "1M")
    qmp = case.daemon().qmp
    for name in ("one", "two"):
        qmp.run("blockdev-add", **image(case, name))
    qmp.run("blockdev-add", driver="file", node_name="nothing", filename=case.path("nothing.raw"))
    address = export(case, qmp, "one")
    nbd.io(address, "write -P 3 0 64k")
    two = {**image(case, "two"), "cache": {"no-flush": True}}
    ok = qmp.attempt("blockdev-reopen", options=[two, {**image(case, "one"), "file": "nothing"}])
    case.note("refused", not ok)
    if not ok:
        show(qmp)
        nbd.io(address, "read -P 3 0 64k", "read -P 1 64k 960k", "write -P 4 64k 64k")
    qmp.run("quit")
    case.images.check("one.qcow2")


@scenario
def links(case):
    """Backings: cycles, references and definitions, an image that names one in its header."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)

    def options(name, **more):
        return {"driver": "qcow2", "node-name": name, "file": f"{name}-file", **more}

    never(qmp, options("base", backing="top"))
    never(qmp, options("mid", backing="mid"))
    never(qmp, options("top", backing=""))
    never(qmp, options("top", backing={"driver": "qcow2", "node-name": "mid", "file": "mid-file"}))
    never(qmp, options("mid"))
    again(qmp, options("mid", backing=None))
    never(qmp, options("mid"))
    again(qmp, options("base"))
    again(qmp, options("base", backing=None))
    again(qmp, options("mid", backing="base"), options("top", backing="mid", **{"read-only": True}))
    show(qmp)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def beside_stream(case):
    """While a stream runs: the links that it needs stay, its base may go, its disk stays writable."""
    case.transcript.mask("offset", "current-progress", "busy")
    case.images.qcow2("low.qcow2", "4M", writes=["write -P 1 0 4M"])
    case.images.qcow2("mid.qcow2", None, backing="low.qcow2", writes=["write -P 2 0 1M"])
    case.images.qcow2("disk.qcow2", None, backing="mid.qcow2", writes=["write -P 3 0 64k"])
    qmp = case.daemon().qmp
    low = image(case, "low")
    disk = image(case, "disk", backing=image(case, "mid", backing=low))
    qmp.run("blockdev-add", **disk)
    qmp.run("block-stream", job_id="job", device="disk", base_node="low", speed=SLOW)
    idle(qmp)
    never(qmp, {**disk, "read-only": True})
    never(qmp, {**disk, "backing": None})
    again(qmp, {**disk, "backing": {**disk["backing"], "backing": None}})
    let_go(qmp)
    show(qmp)
    never(qmp, {**disk, "backing": disk["backing"]})
    qmp.run("quit")
    check(case.images.backing("disk.qcow2")[0] is None, "nothing was below at the end")
    case.images.write(case.path("disk.qcow2"), "read -P 3 0 64k", "read -P 2 64k 960k")


@scenario
def after_stream(case):
    """After a stream: the backing that is left takes options, those of the one that is gone don't fit."""
    case.images.qcow2("low.qcow2", "1M", writes=["write -P 1 0 1M"])
    case.images.qcow2("mid.qcow2", None, backing="low.qcow2", writes=["write -P 2 0 64k"])
    case.images.qcow2("disk.qcow2", None, backing="mid.qcow2")
    qmp = case.daemon().qmp
    low = image(case, "low")
    disk = image(case, "disk", backing=image(case, "mid", backing=low))
    qmp.run("blockdev-add", **disk)
    qmp.run("block-stream", job_id="job", device="disk", base_node="low")
    finish(qmp)
    never(qmp, disk)
    again(qmp, {**disk, "backing": low})
    again(qmp, {**disk, "backing": "low"})
    qmp.run("block-stream", job_id="job", device="disk")
    finish(qmp)
    never(qmp, {**disk, "backing": low})
    again(qmp, image(case, "disk"))
    again(qmp, image(case, "disk", backing=None))
    show(qmp)


@scenario
def beside_commit(case):
    """While layers are committed: their links stay, whether the uppermost is the active one or not."""
    case.transcript.mask("offset", "current-progress", "busy")
    for top in ("disk", "mid"):
        suffix = top[0]
        names = {"low": f"low{suffix}", "mid": f"mid{suffix}", "disk": f"disk{suffix}"}
        case.images.qcow2(f"{names['low']}.qcow2", "2M", writes=["write -P 1 0 1M"])
        case.images.qcow2(f"{names['mid']}.qcow2", None, backing=f"{names['low']}.qcow2", writes=["write -P 2 0 2M"])
        case.images.qcow2(f"{names['disk']}.qcow2", None, backing=f"{names['mid']}.qcow2", writes=["write -P 3 0 1M"])
    qmp = case.daemon().qmp
    for top in ("disk", "mid"):
        suffix = top[0]
        mid = image(case, f"mid{suffix}", backing=image(case, f"low{suffix}"))
        disk = image(case, f"disk{suffix}", backing=mid)
        qmp.run("blockdev-add", **disk)
        qmp.run("block-commit", job_id="job", device=f"disk{suffix}", top_node=f"{top}{suffix}", base_node=f"low{suffix}", speed=SLOW)
        idle(qmp)
        never(qmp, {**disk, "backing": {**mid, "backing": None}})
        never(qmp, {**disk, "backing": None})
        qmp.run("block-job-set-speed", device="job", speed=0)
        if top == "disk":
            qmp.wait("BLOCK_JOB_READY", device="job")
            qmp.run("block-job-complete", device="job")
        finish(qmp)
    show(qmp)
