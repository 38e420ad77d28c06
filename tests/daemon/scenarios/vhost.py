"""vhost-user-blk exports: their life and what is refused. What guests do with them is tested by tests/guest."""

import socket
import struct

from drive import check, scenario


def disk(case):
    """A daemon with a disk that may be written and one that may not; gives its monitor."""
    path = case.images.raw("disk.raw", "4M", 5)
    qmp = case.daemon().qmp
    qmp.run("blockdev-add", driver="file", node_name="disk", filename=path)
    qmp.run("blockdev-add", driver="null-co", node_name="fixed", size=1 << 20, read_only=True)
    return qmp


def add(case, verb, **options):
    """An export with few words."""
    address = {"type": "unix", "path": case.path("vhost.sock")}
    return verb("block-export-add", **{"type_": "vhost-user-blk", "id": "e", "node_name": "disk", "addr": address, **options})


def ask(client, code):
    """A question that is answered with a number."""
    client.sendall(struct.pack("<III", code, 1, 0))
    reply = exactly(client, 20)
    check(len(reply) == 20, "no answer")
    return struct.unpack("<IIIQ", reply)[3]


def exactly(connection, length):
    """So many bytes, in however many pieces they come."""
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        check(piece, f"the connection ended after {len(data)} of {length} bytes")
        data += piece
    return data


@scenario
def life(case):
    """Add, ask, delete, add again at the same place."""
    qmp = disk(case)
    add(case, qmp.run, writable=True, num_queues=4, logical_block_size=4096)
    qmp.run("query-block-exports")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(case.path("vhost.sock"))
        features = ask(client, 1)
        for bit in (2, 6, 9, 10, 11, 12, 13, 14, 28, 29, 30, 32):
            check(features & 1 << bit, f"feature {bit} is missing")
        check(not features & 1 << 5, "it can't be written")
        client.shutdown(socket.SHUT_RDWR)
        check(client.recv(1) == b"", "not closed")
    add(case, qmp.refuse)
    add(case, qmp.run, id="f", node_name="fixed", addr={"type": "unix", "path": case.path("second.sock")})
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(case.path("second.sock"))
        check(ask(client, 1) & 1 << 5, "it can be written")
    qmp.run("block-export-del", id="f", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="f")
    qmp.run("block-export-del", id="e", mode="hard")
    qmp.wait("BLOCK_EXPORT_DELETED", id="e")
    add(case, qmp.run, logical_block_size=0)
    qmp.run("query-block-exports")
    qmp.run("blockdev-add", driver="null-co", node_name="other")
    qmp.refuse("blockdev-del", node_name="disk")
    qmp.run("quit")


@scenario
def resized(case):
    """A disk that grows: the machine is told to look again."""
    qmp = disk(case)
    add(case, qmp.run, writable=True)
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as client, ours, theirs:
        ours.settimeout(20)
        client.settimeout(20)
        client.connect(case.path("vhost.sock"))
        features, protocol = ask(client, 1), ask(client, 15)
        # The configuration, and a channel on which changes of it are told.
        client.sendall(struct.pack("<IIIQ", 16, 1, 8, protocol & (1 << 9 | 1 << 5)))
        client.sendall(struct.pack("<III", 3, 1, 0))
        client.sendall(struct.pack("<IIIQ", 2, 1, 8, features & (1 << 30 | 1 << 32)))
        socket.send_fds(client, [struct.pack("<III", 21, 1, 0)], [theirs.fileno()])
        ask(client, 1)
        qmp.run("block_resize", node_name="disk", size=8 << 20)
        change = exactly(ours, 12)
        check(struct.unpack("<III", change) == (2, 1, 0), f"no change is told: {change}")
        client.sendall(struct.pack("<IIIIII8x", 24, 1, 20, 0, 8, 0))
        reply = exactly(client, 32)
        check(struct.unpack("<Q", reply[24:])[0] == 16384, f"the size is {reply[24:]}")
    qmp.run("quit")


@scenario
def refused(case):
    """What can't be."""
    qmp = disk(case)
    add(case, qmp.refuse, num_queues=0)
    add(case, qmp.refuse, num_queues=65536)
    for size in (100, 513, 4 << 20):
        add(case, qmp.refuse, logical_block_size=size)
    add(case, qmp.refuse, addr={"type": "unix", "path": case.path("nowhere/vhost.sock")})
    add(case, qmp.refuse, addr={"type": "inet", "host": "localhost", "port": "1"})
    add(case, qmp.refuse, addr={"type": "unix"})
    add(case, qmp.refuse, node_name="nothing")
    add(case, qmp.refuse, node_name="fixed", writable=True)
    add(case, qmp.refuse, id="9 lives")
    qmp.refuse("block-export-add", type_="vhost-user-blk", id="e", node_name="disk")
    qmp.run("query-block-exports")
    qmp.run("quit")
