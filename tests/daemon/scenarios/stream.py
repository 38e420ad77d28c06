"""block-stream: what is copied, what becomes of the backing link, and what is said on the way."""

from drive import check, nbd, scenario
from drive.jobs import SLOW, export, finish, let_go, query


def backing_is(case, image, path, form="qcow2"):
    """What the header says about the backing file."""
    found = case.images.backing(image)
    wanted = (path and case.path(path), path and form)
    check(found == wanted, f"{image} should be backed by {wanted}, is by {found}")


@scenario
def full(case):
    """The whole chain into its top."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="job", device="top")
    done = finish(qmp)
    check(done["offset"] == done["len"], f"completed, but {done}")
    query(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("blockdev-del", node_name="mid")
    qmp.run("blockdev-del", node_name="base")
    qmp.run("quit")
    backing_is(case, "top.qcow2", None)
    chain.reads_as_before()
    case.images.check("mid.qcow2")


@scenario
def alone(case):
    """An image without a backing one: nothing to do, done all the same."""
    case.images.chain("only")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="only", file={"driver": "file", "filename": case.path("only.qcow2")})
    qmp.run("block-stream", job_id="job", device="only")
    finish(qmp)


@scenario
def raw_top(case):
    """A raw image has no backing; streaming into it is no error."""
    path = case.images.raw("disk.raw", "1M", 7)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="raw", node_name="disk", file={"driver": "file", "filename": path})
    qmp.run("block-stream", job_id="job", device="disk")
    finish(qmp)


@scenario
def default_id(case):
    """A node's job without an id: refused, because no device gives it a name."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.refuse("block-stream", device="top")
    qmp.refuse("block-stream", job_id="", device="top")
    qmp.refuse("block-stream", job_id="0job", device="top")
    qmp.refuse("block-stream", job_id="a b", device="top")
    qmp.refuse("block-stream", job_id="job#1", device="top")
    qmp.run("query-jobs")


def partial(case, names, keeps, **where):
    """Streams a part of a chain: the top keeps `keeps` as its backing."""
    chain = case.images.chain(*names)
    qmp = case.daemon().qmp
    chain.add(qmp)
    where = {key: value(case) if callable(value) else value for key, value in where.items()}
    qmp.run("block-stream", job_id="job", device="top", **where)
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "top.qcow2", f"{keeps}.qcow2")
    chain.reads_as_before()


@scenario
def base_node(case):
    """Down to a base that is named by its node."""
    partial(case, ["base", "mid", "top"], "base", base_node="base")


@scenario
def base_name(case):
    """Down to a base that is named by its file."""
    partial(case, ["base", "low", "mid", "top"], "low", base=lambda case: case.path("low.qcow2"))


@scenario
def bottom(case):
    """From the lowest image that is still copied."""
    partial(case, ["base", "low", "mid", "top"], "base", bottom="low")


@scenario
def bottom_next(case):
    """Bottom is the image right below the top."""
    partial(case, ["base", "low", "mid", "top"], "low", bottom="mid")


@scenario
def base_is_backing(case):
    """Base is the direct backing: nothing is copied, the link stays."""
    partial(case, ["base", "mid", "top"], "mid", base_node="mid")


@scenario
def bottom_is_top(case):
    """Bottom is the top itself: nothing is copied."""
    partial(case, ["base", "mid", "top"], "mid", bottom="top")


@scenario
def intermediate(case):
    """Into a middle node, while the top stays on it."""
    chain = case.images.chain("base", "low", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="job", device="mid")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "mid.qcow2", None)
    backing_is(case, "top.qcow2", "mid.qcow2")
    chain.reads_as_before()
    case.images.check("mid.qcow2")


@scenario
def intermediate_with_base(case):
    """Into a middle node down to a base."""
    chain = case.images.chain("base", "low", "mid", "high", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="job", device="high", base_node="base")
    finish(qmp)
    qmp.run("quit")
    backing_is(case, "high.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def implicit_chain(case):
    """Backing from the header: the daemon opens the chain, names the nodes itself and closes them when they are out."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": chain.file("top")})
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("block-stream", job_id="job", device="top", base=chain.file("base"))
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("block-stream", job_id="again", device="top")
    finish(qmp, "again")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "top.qcow2", None)
    chain.reads_as_before()


@scenario
def again(case):
    """Stream after stream, with the same id."""
    chain = case.images.chain("base", "low", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    for where in ({"base_node": "low"}, {"base_node": "base"}, {}, {}):
        qmp.run("block-stream", job_id="job", device="top", **where)
        finish(qmp)
    qmp.run("quit")
    backing_is(case, "top.qcow2", None)
    chain.reads_as_before()


@scenario
def backing_file(case):
    """What is written into the header is what backing-file says, whatever the base is called here."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="job", device="top", base_node="base", backing_file="base.qcow2")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    check(case.images.backing("top.qcow2") == ("base.qcow2", "qcow2"), f"header: {case.images.backing('top.qcow2')}")
    chain.reads_as_before()


@scenario
def backing_file_without_base(case):
    """backing-file needs a base."""
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.refuse("block-stream", job_id="job", device="top", backing_file="other.qcow2")
    qmp.run("query-jobs")


@scenario
def backing_mask_protocol(case):
    """With backing-mask-protocol a protocol's filter doesn't get its driver name into the header."""
    chain = case.images.chain("base", "mid", "top")
    for mask in (True, False):
        qmp = case.daemon().qmp
        case.images.qcow2("over.qcow2", None, "mid.qcow2")
        chain.add(qmp)
        qmp.run("blockdev-add", driver="file", node_name="over-file", filename=case.path("over.qcow2"))
        qmp.run("blockdev-add", driver="qcow2", node_name="over", file="over-file", backing="mid")
        qmp.run("block-stream", job_id="job", device="over", base_node="base", backing_mask_protocol=mask)
        finish(qmp)
        qmp.run("quit")
        case.note(f"backing, mask {mask}", case.images.backing("over.qcow2"))


@scenario
def raw_base(case):
    """A raw base: the link names it with its format."""
    case.images.raw("base.raw", "4M", 9)
    case.images.qcow2("mid.qcow2", None, "base.raw", backing_format="raw", writes=["write -P 2 1M 1M"])
    case.images.qcow2("top.qcow2", None, "mid.qcow2", writes=["write -P 3 2M 64k"])
    case.images.copy("top.qcow2", "expected.raw")
    for mask in (False, True):
        case.images.duplicate("top.qcow2", "over.qcow2")
        qmp = case.daemon().qmp
        qmp.run("blockdev-add", driver="file", node_name="base-file", filename=case.path("base.raw"))
        qmp.run("blockdev-add", driver="raw", node_name="base", file="base-file")
        qmp.run("blockdev-add", driver="file", node_name="mid-file", filename=case.path("mid.qcow2"))
        qmp.run("blockdev-add", driver="qcow2", node_name="mid", file="mid-file", backing="base")
        qmp.run("blockdev-add", driver="file", node_name="over-file", filename=case.path("over.qcow2"))
        qmp.run("blockdev-add", driver="qcow2", node_name="over", file="over-file", backing="mid")
        extra = {"backing_mask_protocol": True} if mask else {}
        qmp.run("block-stream", job_id="job", device="over", base_node="base", **extra)
        finish(qmp)
        qmp.run("quit")
        case.note(f"backing, mask {mask}", case.images.backing("over.qcow2"))
        case.images.same("over.qcow2", "expected.raw")


@scenario
def protocol_base(case):
    """A base that is a protocol node: what the header says its format is, with and without the mask."""
    case.images.raw("base.raw", "4M", 9)
    case.images.qcow2("mid.qcow2", None, "base.raw", backing_format="raw", writes=["write -P 2 1M 1M"])
    case.images.qcow2("top.qcow2", None, "mid.qcow2", writes=["write -P 3 2M 64k"])
    case.images.copy("top.qcow2", "expected.raw")
    for mask in (False, True):
        case.images.duplicate("top.qcow2", "over.qcow2")
        qmp = case.daemon().qmp
        qmp.run("blockdev-add", driver="file", node_name="base", filename=case.path("base.raw"))
        qmp.run("blockdev-add", driver="qcow2", node_name="mid", file={"driver": "file", "filename": case.path("mid.qcow2")}, backing="base")
        qmp.run("blockdev-add", driver="qcow2", node_name="over", file={"driver": "file", "filename": case.path("over.qcow2")}, backing="mid")
        qmp.run("block-stream", job_id="job", device="over", base_node="base", backing_mask_protocol=mask)
        finish(qmp)
        qmp.run("quit")
        case.note(f"backing, mask {mask}", case.images.backing("over.qcow2"))
        if mask:
            case.images.same("over.qcow2", "expected.raw")


@scenario
def wrong_arguments(case):
    """Each refusal and its reason."""
    chain = case.images.chain("base", "mid", "top")
    case.images.chain("other")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="qcow2", node_name="other", file={"driver": "file", "filename": case.path("other.qcow2")})
    stream = {"job_id": "job", "device": "top"}
    qmp.refuse("block-stream", job_id="job", device="nowhere")
    qmp.refuse("block-stream", **stream, base_node="nowhere")
    qmp.refuse("block-stream", **stream, base_node="other")
    qmp.refuse("block-stream", **stream, base_node="top")
    qmp.refuse("block-stream", **stream, base="nowhere.qcow2")
    qmp.refuse("block-stream", **stream, base=chain.file("base"), base_node="base")
    qmp.refuse("block-stream", **stream, bottom="mid", base_node="base")
    qmp.refuse("block-stream", **stream, bottom="nowhere")
    qmp.refuse("block-stream", **stream, bottom="other")
    qmp.refuse("block-stream", **stream, speed=-1)
    qmp.refuse("block-stream", **stream, on_error="panic")
    qmp.refuse("block-stream", **stream, auto_finalize="yes")
    qmp.refuse("block-stream", **stream, filter_node_name="mid")
    qmp.refuse("block-stream", **stream, unknown=1)
    qmp.refuse("block-stream", device="top", job_id=5)
    qmp.refuse("block-stream", job_id="job")
    qmp.run("query-jobs")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def filter_node_name(case):
    """The filter that a stream puts above its top, by a name of one's own."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="job", device="top", speed=SLOW, filter_node_name="shield")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.refuse("blockdev-del", node_name="shield")
    let_go(qmp)
    qmp.run("query-named-block-nodes", flat=True)


@scenario
def grown(case):
    """An overlay larger than its backing reads as zeroes behind it, also afterwards."""
    case.images.qcow2("base.qcow2", "2M", writes=["write -P 1 0 2M"])
    case.images.qcow2("top.qcow2", "3584k", "base.qcow2", writes=["write -P 2 3M 64k"])
    sizes(case, 3584 * 1024)


@scenario
def shrunken(case):
    """An overlay smaller than its backing."""
    case.images.qcow2("base.qcow2", "4M", writes=["write -P 1 0 4M"])
    case.images.qcow2("top.qcow2", "2560k", "base.qcow2", writes=["write -P 2 1M 64k"])
    sizes(case, 2560 * 1024)


@scenario
def hidden_by_short_middle(case):
    """What a short middle image hides stays hidden: it reads as zeroes."""
    case.images.qcow2("base.qcow2", "4M", writes=["write -P 1 0 4M"])
    case.images.qcow2("mid.qcow2", "1M", "base.qcow2")
    case.images.qcow2("top.qcow2", "4M", "mid.qcow2", writes=["write -P 2 3M 64k"])
    sizes(case, 4 << 20)


@scenario
def odd_size(case):
    """A size that is no multiple of a cluster."""
    case.images.qcow2("base.qcow2", "1049088", writes=["write -P 1 0 1049088"])
    case.images.qcow2("top.qcow2", "1049088", "base.qcow2")
    sizes(case, 1049088)


def sizes(case, length):
    """Streams `top.qcow2` and compares with what it read as."""
    case.images.copy("top.qcow2", "expected.raw")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": case.path("top.qcow2")})
    qmp.run("block-stream", job_id="job", device="top")
    done = finish(qmp)
    check(done["len"] == length, f"the job's length is {done['len']}, the image has {length}")
    qmp.run("quit")
    backing_is(case, "top.qcow2", None)
    case.images.same("top.qcow2", "expected.raw", strict=False)
    case.images.check("top.qcow2")
    check(case.images.info("top.qcow2")["virtual-size"] == length, "the size changed")


@scenario
def zeroes_stay_zeroes(case):
    """What the top has as zeroes, and what the base has as zeroes, needs no data."""
    case.images.qcow2("base.qcow2", "4M", writes=["write -P 1 0 3M", "write -z 1M 1M"])
    case.images.qcow2("top.qcow2", "4M", "base.qcow2", writes=["write -z 0 512k", "discard 2M 512k"])
    case.images.copy("top.qcow2", "expected.raw")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="qcow2", node_name="top", discard="unmap", file={"driver": "file", "filename": case.path("top.qcow2")})
    qmp.run("block-stream", job_id="job", device="top")
    finish(qmp)
    qmp.run("quit")
    case.images.same("top.qcow2", "expected.raw")
    case.note("map", [extent[:2] + extent[4:] for extent in case.images.map("top.qcow2")])


@scenario
def read_only_top(case):
    """A top that is opened for reading only: opened for writing for the job, or refused; never half."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp, read_only=True)
    if qmp.attempt("block-stream", job_id="job", device="top"):
        finish(qmp)
    qmp.run("quit")
    case.note("backing", case.images.backing("top.qcow2"))
    chain.reads_as_before()


@scenario
def read_only_middle(case):
    """A middle image opened for reading only is made writable for the job, and read-only again."""
    chain = case.images.chain("base", "low", "mid", "top")
    qmp = case.daemon().qmp
    below = {"driver": "qcow2", "node-name": "base", "read-only": True, "file": {"driver": "file", "filename": chain.file("base")}}
    for name in ("low", "mid", "top"):
        below = {"driver": "qcow2", "node-name": name, "read-only": name != "top", "file": {"driver": "file", "filename": chain.file(name)}, "backing": below}
    qmp.run("blockdev-add", **below)
    qmp.run("block-stream", job_id="job", device="mid", base_node="base")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "mid.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def throttles_between(case):
    """Throttle nodes between the layers, above and below base."""
    chain = case.images.chain("base", "low", "mid", "top")
    qmp = case.daemon("--object", "throttle-group,id=group,x-bps-read=104857600").qmp

    def throttle(name):
        return {"driver": "throttle", "node-name": f"{name}-throttle", "throttle-group": "group", "file": name}

    chain.add(qmp, wrap={"base": throttle, "low": throttle, "mid": throttle})
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("block-stream", job_id="job", device="top", base_node="base-throttle")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("block-stream", job_id="rest", device="top")
    finish(qmp, "rest")
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def base_below_throttle(case):
    """The base is the node below a filter; what the filter does of the link afterwards."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon("--object", "throttle-group,id=group").qmp
    chain.add(qmp, wrap={"base": lambda name: {"driver": "throttle", "node-name": "above", "throttle-group": "group", "file": name}})
    qmp.run("block-stream", job_id="job", device="top", base_node="base")
    finish(qmp)
    qmp.run("query-named-block-nodes", flat=True)
    qmp.run("quit")
    backing_is(case, "top.qcow2", "base.qcow2")
    chain.reads_as_before()


@scenario
def device_is_filter(case):
    """The device is a filter above the top."""
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon("--object", "throttle-group,id=group").qmp
    chain.add(qmp)
    qmp.run("blockdev-add", driver="throttle", node_name="above", throttle_group="group", file="top")
    if qmp.attempt("block-stream", job_id="job", device="above"):
        finish(qmp)
    qmp.run("quit")
    case.note("backing", case.images.backing("top.qcow2"))
    chain.reads_as_before()


@scenario
def guest_writes(case):
    """A client writes, discards and reads while the stream runs; its data win."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "mid", "top")
    qmp = case.daemon().qmp
    chain.add(qmp, discard="unmap")
    client = nbd.Client(case, export(case, qmp, "top"))
    qmp.run("block-stream", job_id="job", device="top", speed=SLOW)
    writes = [f"write -P {50 + step} {step * 400 + 3}k 70k" for step in range(9)] + ["write -z 2500k 200k", "write -P 99 3990k 100k"]
    for write in writes:
        client.do(write)
    client.do("read -P 50 3k 70k")
    client.do("read -P 0 2500k 200k")
    chain.guest_wrote(*writes)
    qmp.run("block-job-set-speed", device="job", speed=4 << 20)
    for step in range(9):
        client.do(f"write -P {80 + step} {step * 300 + 11}k 30k")
    chain.guest_wrote(*[f"write -P {80 + step} {step * 300 + 11}k 30k" for step in range(9)])
    finish(qmp)
    client.do("flush")
    client.do("read -P 80 11k 30k")
    client.close()
    qmp.run("quit")
    backing_is(case, "top.qcow2", None)
    chain.reads_as_before()


@scenario
def on_a_read_only_file(case):
    """A file that the user opened read-only is not written, though the disk on it may be made writable."""
    case.images.qcow2("low.qcow2", "1M", writes=["write -P 1 0 1M"])
    case.images.qcow2("disk.qcow2", None, backing="low.qcow2")
    qmp = case.daemon().qmp
    for name, said in (("kept", {"read-only": True}), ("open", {})):
        file = {"driver": "file", "filename": case.path("disk.qcow2"), **said}
        qmp.run("blockdev-add", driver="qcow2", node_name=name, read_only=True, file=file)
        qmp.attempt("block-stream", job_id=name, device=name)
        if said:
            qmp.run("query-jobs")
            qmp.run("blockdev-del", node_name=name)
    qmp.wait("BLOCK_JOB_COMPLETED", device="open")
    qmp.wait_status("open", "null")
    qmp.run("quit")
    check(case.images.backing("disk.qcow2")[0] is None, "the second was streamed into")
