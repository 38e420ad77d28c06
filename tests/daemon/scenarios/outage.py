"""Jobs and the end of the daemon while an NBD server is away that its node would wait for long."""

import time

from drive import check, nbd, scenario
from drive.jobs import export, finish

# So long a node waits for its server to come back. Nothing here does.
DELAY = 120
# What is told to be over soon is over in this time, in seconds.
SOON = 10


def serve(case, path):
    """An NBD server over a raw image; gives it and its socket."""
    socket = case.path("far.sock")
    server = case.spawn(["qemu-nbd", "--persistent", "--shared=8", "-f", "raw", "-k", socket, path])
    deadline = time.monotonic() + SOON
    while not nbd.reachable(nbd.uri(socket)):
        check(time.monotonic() < deadline, "the server doesn't start")
        time.sleep(0.02)
    return server, socket


def far(socket):
    """The options of a raw node behind a server that is waited for."""
    server = {"type": "unix", "path": socket}
    return {"driver": "raw", "node-name": "far", "file": {"driver": "nbd", "server": server, "reconnect-delay": DELAY}}


def away(server):
    """The server dies."""
    server.kill()
    server.wait()


def start(case, command, size="8M", **options):
    """A job whose target went away while it was copied to; gives the daemon, the server's socket and the address of the disk."""
    case.transcript.mask("offset", "len", "current-progress", "total-progress", "busy")
    disk = case.images.raw("disk.raw", size, fill=1)
    target = case.images.raw("target.raw", size)
    server, socket = serve(case, target)
    daemon = case.daemon()
    qmp = daemon.qmp
    qmp.run("blockdev-add", driver="raw", node_name="disk", file={"driver": "file", "filename": disk})
    qmp.run("blockdev-add", **far(socket))
    address = export(case, qmp, "disk")
    qmp.run(command, job_id="job", device="disk", target="far", sync="full", speed=1 << 20, **options)
    qmp.poll(lambda: qmp.block_job("job")["offset"] > 0, "the first copies are made")
    away(server)
    qmp.run("block-job-set-speed", device="job", speed=0)
    # Copies are on their way, and wait.
    time.sleep(0.5)
    return daemon, socket, address


def soon(what, begun):
    """What was to be over soon is over."""
    took = time.monotonic() - begun
    check(took < SOON, f"{what} took {took:.1f} s")


def cancel(qmp, command="block-job-cancel", **words):
    """Cancels a job by force; it must end soon, and let its target go."""
    begun = time.monotonic()
    qmp.run(command, **words)
    qmp.wait("BLOCK_JOB_CANCELLED", device="job")
    qmp.wait_status("job", "null")
    soon("the cancel", begun)
    qmp.run("blockdev-del", node_name="far")
    soon("the removal of the target", begun)


@scenario
def mirror_is_cancelled(case):
    """A mirror whose target is away ends as soon as it is cancelled."""
    daemon, _, address = start(case, "blockdev-mirror")
    cancel(daemon.qmp, device="job", force=True)
    nbd.io(address, "write -P 2 0 1M", "read -P 2 0 1M")


@scenario
def backup_is_cancelled(case):
    """A backup, by the other family's verb."""
    daemon, _, address = start(case, "blockdev-backup")
    cancel(daemon.qmp, "job-cancel", id="job")
    nbd.io(address, "write -P 2 0 1M", "read -P 2 0 1M")


@scenario
def guests_go_on(case):
    """A guest whose change waits until a backup has saved what was there goes on when that is cancelled. The reference fails it."""
    daemon, _, address = start(case, "blockdev-backup")
    guest = nbd.Client(case, address)
    guest.start("write -P 7 7M 64k")
    time.sleep(0.3)
    cancel(daemon.qmp, device="job", force=True)
    written = "failed" not in guest.result()
    case.note("the guest's write", written)
    guest.do(f"read -P {7 if written else 1} 7M 64k")
    guest.close()


@scenario
def guests_go_on_through(case):
    """A guest whose change goes through to a mirror's target."""
    daemon, _, address = start(case, "blockdev-mirror", copy_mode="write-blocking")
    guest = nbd.Client(case, address)
    guest.start("write -P 7 7M 64k")
    time.sleep(0.3)
    cancel(daemon.qmp, device="job", force=True)
    check("failed" not in guest.result(), "the guest's write failed")
    guest.do("read -P 7 7M 64k")
    guest.close()


@scenario
def server_comes_back(case):
    """Who isn't cancelled waits, and goes on when the server is back."""
    daemon, _, address = start(case, "blockdev-backup")
    qmp = daemon.qmp
    serve(case, case.path("target.raw"))
    finish(qmp)
    qmp.run("blockdev-del", node_name="far")
    qmp.run("block-export-del", id="export-disk")
    qmp.wait("BLOCK_EXPORT_DELETED")
    case.images.same("target.raw", "disk.raw", form="raw")
    check(not nbd.reachable(address), "it is exported no more")
