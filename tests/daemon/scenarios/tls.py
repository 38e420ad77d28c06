"""TLS with a key that both sides have, between the daemon and QEMU's tools and libnbd, and what is refused."""

import os
import subprocess

from drive import check, nbd, scenario
from drive.images import tool
from drive.monitor import PATIENCE

KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"


def keys(case, name, **users):
    """A directory with the keys of these users."""
    directory = case.path(name)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "keys.psk"), "w", encoding="utf-8") as file:
        file.writelines(f"{user}:{key}\n" for user, key in users.items())
    return directory


def address(socket, user, directory):
    """The URI of the export "disk", as libnbd takes it."""
    return f"nbds+unix://{user}@/disk?socket={socket}&tls-psk-file={directory}/keys.psk"


def options(socket, user, directory):
    """The same as arguments of QEMU's tools."""
    object_ = f"tls-creds-psk,id=tls,endpoint=client,username={user},dir={directory}"
    return ["--object", object_, "--image-opts", f"driver=nbd,server.type=unix,server.path={socket},export=disk,tls-creds=tls"]


def told_at_once(*words):
    """Whether a client fails, soon and by itself."""
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=False)
    check(done.returncode != 0, f"{words} succeeds")


@scenario
def psk_server(case):
    """Clients with a key get at an export, whoever has none of that name or another or speaks in clear doesn't."""
    ours = keys(case, "ours", alice=KEY, qemu=KEY[::-1])
    theirs = keys(case, "theirs", alice=KEY[::-1], carol=KEY)
    socket = case.path("nbd.sock")
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="null-co", node_name="null", size=1 << 20, read_zeroes=True)
    qmp.run("object-add", qom_type="tls-creds-psk", id="keys", dir=ours, endpoint="server")
    qmp.run("nbd-server-start", addr={"type": "unix", "data": {"path": socket}}, tls_creds="keys")
    qmp.run("block-export-add", type_="nbd", id="e", node_name="null", name="disk", writable=True)
    tool("nbdinfo", "--size", address(socket, "alice", ours))
    tool("qemu-img", "info", *options(socket, "alice", ours))
    tool("qemu-img", "info", *options(socket, "qemu", ours))
    for user in ("alice", "carol"):
        told_at_once("nbdinfo", "--size", address(socket, user, theirs))
        told_at_once("qemu-img", "info", *options(socket, user, theirs))
    check(not nbd.reachable(nbd.uri(socket, "disk")), "a client in clear gets at the export")
    tool("nbdinfo", "--size", address(socket, "alice", ours))
    qmp.run("quit")


@scenario
def psk_client(case):
    """A node behind a server with keys: with the right one, and with what is refused when it is opened."""
    ours = keys(case, "ours", alice=KEY, qemu=KEY[::-1])
    theirs = keys(case, "theirs", alice=KEY[::-1], carol=KEY)
    socket = case.path("far.sock")
    image = case.images.raw("far.raw", "1M", 7)
    server = ["--object", f"tls-creds-psk,id=tls,endpoint=server,dir={ours}", "--tls-creds", "tls"]
    case.spawn(["qemu-nbd", *server, "--socket", socket, "--export-name", "disk", "--persistent", "--shared=0", "--format", "raw", image])
    qmp = case.daemon().qmp
    qmp.poll(lambda: os.path.exists(socket), "qemu-nbd")
    qmp.run("object-add", qom_type="tls-creds-psk", id="alice", dir=ours, endpoint="client", username="alice")
    qmp.run("object-add", qom_type="tls-creds-psk", id="qemu", dir=ours)
    qmp.run("object-add", qom_type="tls-creds-psk", id="impostor", dir=theirs, username="alice")
    qmp.run("object-add", qom_type="tls-creds-psk", id="stranger", dir=theirs, username="carol")
    far = {"driver": "nbd", "server": {"type": "unix", "path": socket}, "export": "disk", "read-only": True}
    for user in ("alice", "qemu"):
        qmp.run("blockdev-add", **{**far, "node-name": user, "tls-creds": user})
    for user in ("impostor", "stranger"):
        qmp.refuse("blockdev-add", **{**far, "node-name": user, "tls-creds": user})
    qmp.refuse("blockdev-add", **{**far, "node-name": "plain"})
    qmp.run("quit")


@scenario
def psk_objects(case):
    """Which properties are refused, and credentials for the wrong end."""
    ours = keys(case, "ours", alice=KEY)
    qmp = case.daemon().qmp
    psk = {"qom_type": "tls-creds-psk", "id": "o"}
    qmp.refuse("object-add", **psk)
    qmp.refuse("object-add", **psk, dir=case.path("nowhere"), endpoint="server")
    qmp.refuse("object-add", **psk, dir=case.path("nowhere"), endpoint="client")
    qmp.refuse("object-add", **psk, dir=ours, endpoint="server", username="alice")
    qmp.refuse("object-add", **psk, dir=ours)
    qmp.refuse("object-add", **psk, dir=ours, username="bob")
    qmp.refuse("object-add", **psk, dir=ours, endpoint="both")
    qmp.run("object-add", **psk, dir=ours, username="alice", verify_peer=False)
    address_ = {"type": "unix", "data": {"path": case.path("nbd.sock")}}
    qmp.refuse("nbd-server-start", addr=address_, tls_creds="o")
    qmp.run("object-del", id="o")
    qmp.run("object-add", **psk, dir=ours, endpoint="server")
    qmp.refuse("blockdev-add", driver="nbd", node_name="n", server={"type": "unix", "path": case.path("x.sock")}, tls_creds="o")
    qmp.run("quit")
