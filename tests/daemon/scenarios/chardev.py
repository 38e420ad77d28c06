"""Character devices by QMP, and what is told of types and properties."""

import os

from drive import scenario


def add(qmp, name, kind, **data):
    """The arguments of chardev-add."""
    return {"id": name, "backend": {"type": kind, "data": data}}


@scenario
def rings(case):
    """What is written can be read once; what doesn't fit pushes the oldest out."""
    qmp = case.daemon().qmp
    qmp.run("chardev-add", **add(qmp, "r", "ringbuf", size=16))
    qmp.run("ringbuf-write", device="r", data="hello")
    qmp.run("ringbuf-write", device="r", data="aGk=", format="base64")
    qmp.run("ringbuf-read", device="r", size=3)
    qmp.run("ringbuf-read", device="r", size=30, format="base64")
    qmp.run("ringbuf-read", device="r", size=30)
    qmp.run("ringbuf-write", device="r", data="0123456789abcdefghij")
    qmp.run("ringbuf-read", device="r", size=100)
    qmp.run("ringbuf-write", device="r", data="0123456789")
    qmp.run("ringbuf-write", device="r", data="abcdefghij")
    qmp.run("ringbuf-read", device="r", size=100)
    qmp.run("ringbuf-write", device="r", data="/w==", format="base64")
    qmp.run("ringbuf-read", device="r", size=10)
    qmp.refuse("ringbuf-write", device="r", data="!!!!", format="base64")
    qmp.refuse("ringbuf-read", device="r", size=0)
    qmp.refuse("ringbuf-read", device="r", size=-1)
    qmp.refuse("ringbuf-read", device="none", size=1)
    qmp.refuse("ringbuf-write", device="none", data="x")
    qmp.run("chardev-add", **add(qmp, "n", "null"))
    qmp.refuse("ringbuf-read", device="n", size=1)
    qmp.refuse("chardev-add", **add(qmp, "odd", "ringbuf", size=100))
    qmp.run("chardev-add", **add(qmp, "default", "ringbuf"))
    qmp.run("chardev-add", **add(qmp, "old", "memory"))


@scenario
def come_and_go(case):
    """Added, exchanged, removed; the monitor's own stays."""
    qmp = case.daemon().qmp
    path = case.path("x.sock")
    server = add(qmp, "s", "socket", addr={"type": "unix", "data": {"path": path}}, server=True, wait=False)
    qmp.run("chardev-add", **server)
    case.note("listens", os.path.exists(path))
    told = {info["label"]: [info["filename"].startswith("disconnected:"), info["frontend-open"]] for info in qmp.quiet("query-chardev")}
    case.note("told", told)
    qmp.refuse("chardev-add", **server)
    nowhere = {"addr": {"type": "unix", "data": {"path": case.path("nowhere.sock")}}, "server": False}
    qmp.refuse("chardev-add", **add(qmp, "c", "socket", **nowhere))
    qmp.refuse("chardev-add", **add(qmp, "c", "nonsense"))
    qmp.refuse("chardev-add", id="c")
    qmp.run("chardev-change", **add(qmp, "s", "null"))
    case.note("listens no more", not os.path.exists(path))
    qmp.refuse("chardev-change", **add(qmp, "none", "null"))
    monitor = next(info["label"] for info in qmp.quiet("query-chardev") if info["frontend-open"])
    qmp.refuse("chardev-change", **add(qmp, monitor, "null"))
    qmp.refuse("chardev-remove", id=monitor)
    qmp.run("chardev-send-break", id="s")
    qmp.refuse("chardev-send-break", id="none")
    qmp.refuse("chardev-remove", id="none")
    qmp.run("chardev-remove", id="s")
    qmp.refuse("chardev-remove", id="s")
    qmp.run("chardev-add", **server)
    qmp.run("chardev-remove", id="s")
    case.note("backends", {"null", "ringbuf", "socket", "stdio", "memory"} <= {backend["name"] for backend in qmp.quiet("query-chardev-backends")})


@scenario
def types(case):
    """Which properties types have, and objects of them."""
    qmp = case.daemon("--object", "throttle-group,id=tg", "--object", "secret,id=sec,data=letmein").qmp

    def properties(command, **what):
        return sorted((found["name"], found["type"]) for found in qmp.quiet(command, **what))

    for kind in ("throttle-group", "secret", "iothread", "tls-creds-x509", "tls-creds-psk"):
        case.note(kind, properties("qom-list-properties", typename=kind))
    for name in ("tg", "sec"):
        case.note(name, properties("qom-list", path=f"/objects/{name}"))
    qmp.refuse("qom-list-properties", typename="nonsense")
    qmp.refuse("qom-list-properties")
    qmp.run("qom-get", path="/objects/sec", property="data")
    qmp.run("qom-get", path="/objects/tg", property="type")
    qmp.refuse("qom-get", path="/objects/tg", property="nonsense")
    ours = {"throttle-group", "secret", "iothread", "tls-creds-x509", "tls-creds-psk"}
    for more in ({}, {"implements": "user-creatable"}, {"implements": "tls-creds"}, {"implements": "secret"}):
        found = {kind["name"]: kind.get("parent") for kind in qmp.quiet("qom-list-types", **more)}
        case.note(f"types {more}", {name: parent for name, parent in sorted(found.items()) if name in ours})
