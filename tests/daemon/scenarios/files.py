"""FUSE exports: a node as a file."""

import os
import subprocess

from drive import check, nbd, scenario
from drive.jobs import SLOW, finish, idle
from scenarios.exports import disk


@scenario
def life(case):
    """A node as a file: read, written, removed; then from the command line."""
    qmp = disk(case, fill=1)
    path = mountpoint(case)
    qmp.run("block-export-add", type="fuse", id="f", node_name="disk", mountpoint=path, writable=True)
    qmp.run("query-block-exports")
    case.note("size", os.path.getsize(path))
    nbd.io(path, "read -P 1 0 64k", "write -P 2 64k 64k", "write -z 128k 64k", "discard 192k 64k", "flush", "read -P 2 64k 64k")
    qmp.refuse("blockdev-del", node_name="disk")
    qmp.refuse("block-export-add", type="fuse", id="g", node_name="disk", mountpoint=path)
    qmp.run("block-export-del", id="f")
    qmp.wait("BLOCK_EXPORT_DELETED", id="f")
    check(os.path.getsize(path) == 0, "the file below is there again")
    qmp.run("block-export-add", type="fuse", id="f", node_name="disk", mountpoint=path)
    nbd.io(path, "read -P 2 64k 64k", read_only=True)
    check(os.stat(path).st_mode & 0o222 == 0, "a file that can't be written")
    qmp.run("quit")
    check(os.path.getsize(path) == 0, "quit unmounts")


@scenario
def streams(case):
    """A file that is used while its disk streams."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp)
    path = mountpoint(case)
    qmp.run("block-export-add", type="fuse", id="f", node_name="top", mountpoint=path, writable=True)
    if not qmp.attempt("block-stream", job_id="job", device="top", speed=SLOW):
        return
    idle(qmp)
    writes = ["write -P 21 1M 64k", "write -z 2M 64k"]
    nbd.io(path, *writes)
    chain.guest_wrote(*writes)
    qmp.run("block-job-set-speed", device="job", speed=0)
    finish(qmp)
    nbd.io(path, "read -P 21 1M 64k")
    qmp.run("quit")
    chain.reads_as_before()


@scenario
def refusals(case):
    """What a FUSE export can't be mounted over, and what isn't done with it."""
    qmp = disk(case)
    os.mkdir(case.path("folder"))
    add = {"type": "fuse", "node_name": "disk"}
    qmp.refuse("block-export-add", id="f", mountpoint=case.path("folder"), **add)
    qmp.refuse("block-export-add", id="f", mountpoint=case.path("missing"), **add)
    qmp.refuse("block-export-add", id="f", **add)
    qmp.refuse("block-export-add", id="f", mountpoint=mountpoint(case), growable="perhaps", **add)
    qmp.run("query-block-exports")


@scenario
def grows(case):
    """A growable file grows the disk."""
    qmp = disk(case, fill=1)
    path = mountpoint(case)
    qmp.run("block-export-add", type="fuse", id="f", node_name="disk", mountpoint=path, writable=True, growable=True)
    before = os.path.getsize(path)
    with open(path, "r+b", buffering=0) as file:
        file.seek(before)
        file.write(b"x" * 512)
    check(os.path.getsize(path) == before + 512, f"the size is {os.path.getsize(path)}")
    os.truncate(path, before + 1024)
    check(os.path.getsize(path) == before + 1024, f"the size is {os.path.getsize(path)}")
    qmp.run("quit")
    check(os.path.getsize(case.path("disk.raw")) == before + 1024, "the image has grown")


def mountpoint(case):
    """An empty file, which is unmounted whatever happens."""
    path = case.path("file")
    with open(path, "wb"):
        pass
    case.defer(lambda: subprocess.run(["umount", "--lazy", "--force", path], check=False, stderr=subprocess.DEVNULL))
    return path
