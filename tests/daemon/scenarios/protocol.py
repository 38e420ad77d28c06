"""QMP itself: greeting, negotiation, ids, errors, several monitors, clients that behave badly."""

import json
import signal
import socket
import time

from drive import check, scenario
from drive.jobs import SLOW, finish, idle
from drive.monitor import RawMonitor


def raw(case, *options, monitors=1):
    """A daemon and a connection in bytes to its first monitor."""
    daemon = case.daemon(*options, monitors=monitors + 1)
    daemon.monitors[0].close()
    return daemon, daemon.raw("raw", monitor=0)


@scenario
def greeting(case):
    """The greeting, and that nothing but qmp_capabilities comes first."""
    daemon, line = raw(case)
    line.ask({"execute": "query-version"})
    line.ask({"execute": "blockdev-add", "arguments": {}})
    line.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["nothing"]}})
    line.ask({"execute": "qmp_capabilities", "arguments": {"enabled": []}})
    line.ask({"execute": "nonsense"})
    line.ask({"execute": "qmp_capabilities"})
    line.ask({"execute": "qmp_capabilities"})
    line.ask({"execute": "query-version"})
    line.close()
    again = daemon.raw("again", monitor=0)
    again.ask({"execute": "query-status"})
    again.negotiate()
    again.ask({"execute": "query-version"})


@scenario
def ids(case):
    """Any JSON value as id comes back as it was, also with errors."""
    _, line = raw(case)
    line.negotiate()
    for number, name in enumerate([1, -5, 1.5, "text", "ünï\u2028", None, True, [1, [2]], {"a": {"b": [None]}}, "", 2**62]):
        answer = line.ask({"execute": "query-version", "id": name}, f"id{number}")
        check("return" in answer and answer.get("id", ()) == name, f"id {name!r} came back as {answer}")
        answer = line.ask({"execute": "nonsense", "id": name}, f"id{number}")
        check("error" in answer and answer.get("id", ()) == name, f"id {name!r} came back as {answer}")
    line.ask({"id": "lost", "execute": 5})
    line.ask({"id": "lost", "arguments": {}})


@scenario
def bad_commands(case):
    """Commands that aren't there, and messages that aren't commands."""
    _, line = raw(case)
    line.negotiate()
    messages = [
        {"execute": "nonsense"},
        {"execute": ""},
        {"execute": 5},
        {"execute": None},
        {},
        {"id": 1},
        {"execute": "query-version", "extra": 1},
        {"execute": "query-version", "arguments": 5},
        {"execute": "query-version", "arguments": []},
        {"execute": "query-version", "arguments": None},
        {"execute": "query-version", "arguments": {"a": 1}},
        {"execute": "query-version", "arguments": {}},
        {"exec-oob": "query-version"},
        {"execute": "query-version", "exec-oob": "query-version"},
        [],
        [{"execute": "query-version"}],
        5,
        "query-version",
        None,
        True,
    ]
    for number, message in enumerate(messages):
        line.ask(message, f"message{number}")


@scenario
def bad_arguments(case):
    """Missing, unexpected and wrongly typed arguments."""
    qmp = case.daemon().qmp
    qmp.refuse("blockdev-add")
    qmp.refuse("blockdev-add", driver="file")
    qmp.refuse("blockdev-add", driver="nonsense", node_name="n")
    qmp.refuse("blockdev-add", driver=5, node_name="n")
    qmp.refuse("blockdev-add", driver="file", node_name="n")
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename=5)
    qmp.refuse("blockdev-add", driver="file", node_name="n", filename="x", nonsense=1)
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", size="large")
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", size=1.5)
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", size=1024, read_only="yes")
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", size=1024, cache="none")
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", size=1024, cache={"mode": "none"})
    qmp.refuse("blockdev-add", driver="null-co", node_name="n", size=1024, detect_zeroes="maybe")
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file=5)
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": 7})
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file={})
    qmp.refuse("blockdev-add", driver="qcow2", node_name="n", file=None)
    qmp.refuse("blockdev-del")
    qmp.refuse("blockdev-del", node_name=5)
    qmp.refuse("blockdev-del", node_name="n", force=True)
    qmp.refuse("query-version", extra=1)
    qmp.refuse("query-named-block-nodes", flat="yes")
    qmp.refuse("quit", now=True)
    qmp.refuse("transaction", actions=[{"type": "nonsense", "data": {}}])
    qmp.refuse("transaction", actions=[{"type": "blockdev-snapshot", "data": {"node": 5}}])


@scenario
def malformed(case):
    """What isn't JSON is refused and leaves the connection usable."""
    _, line = raw(case)
    line.negotiate()
    texts = [b"nonsense\n", b"{]\n", b'{"execute" "x"}\n', b'{"execute": "query-version"\n}\n', b"'\n'\n", b'{"a": maybe}\n', b"\xff\xfe\n", b"]\n", b"}\n"]
    for number, text in enumerate(texts):
        line.send(text)
        line.send({"execute": "query-version", "id": number})
        while True:
            answer = line.read(f"text{number}")
            if answer is None or answer.get("id", ()) == number:
                break
        check(answer is not None, f"the connection ended after {text!r}")


@scenario
def pieces(case):
    """A command in single bytes; commands without line ends; single quotes; white space; two in a line."""
    _, line = raw(case)
    line.negotiate()
    for byte in b'{"execute": "query-version", "id": "bytes"}':
        line.send(bytes([byte]))
    line.read("bytes")
    line.send(b'{"execute":"query-version","id":1}{"execute":"query-version","id":2}  \r\n\t {"execute":"query-version",\n\n"id":3}')
    for _ in range(3):
        line.read("together")
    line.send(b"{'execute': 'query-version', 'id': 'single'}")
    line.read("single quotes")


@scenario
def pipelined(case):
    """Thousands of commands at once are answered in order, and events stand where they belong."""
    case.images.raw("disk.raw", "1M")
    daemon, line = raw(case)
    line.negotiate()
    count = 5000
    burst = b"".join(json.dumps({"execute": "query-version", "id": number}).encode() for number in range(count))
    line.socket.setblocking(False)
    sent, got = 0, 0
    deadline = time.monotonic() + 20
    while got < count:
        check(time.monotonic() < deadline, f"{got} of {count} answers")
        if sent < len(burst):
            try:
                sent += line.socket.send(burst[sent : sent + 65536])
            except BlockingIOError:
                pass
        try:
            line._buffer += line.socket.recv(1 << 20)
        except BlockingIOError:
            time.sleep(0.001)
        *whole, line._buffer = line._buffer.split(b"\n")
        for text in whole:
            answer = json.loads(text)
            check(answer.get("id", ()) == got and "return" in answer, f"answer {got} is {answer}")
            got += 1
    line.socket.settimeout(20)
    line.ask({"execute": "query-block-jobs"})


@scenario
def order_of_effects(case):
    """Pipelined commands take effect in order: a job's events come before the reply to the next command."""
    chain = case.images.chain("base", "top")
    daemon, line = raw(case)
    line.negotiate()
    add = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": chain.file("top")}}
    commands = [
        {"execute": "blockdev-add", "arguments": add, "id": 1},
        {"execute": "blockdev-add", "arguments": add, "id": 2},
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}, "id": 3},
        {"execute": "blockdev-add", "arguments": add, "id": 4},
        {"execute": "block-stream", "arguments": {"device": "top", "job-id": "job", "auto-finalize": False, "speed": SLOW}, "id": 5},
        {"execute": "blockdev-del", "arguments": {"node-name": "top"}, "id": 6},
        {"execute": "nonsense", "id": 7},
    ]
    line.send(b"".join(json.dumps(command).encode() for command in commands))
    while line.read("answer").get("id") != 7:
        pass


@scenario
def several_monitors(case):
    """Each monitor gets each event; a reply goes to the one that asked."""
    chain = case.images.chain("base", "top")
    daemon = case.daemon(monitors=3)
    first, second, third = daemon.monitors
    chain.add(first)
    second.run("block-stream", job_id="job", device="top", auto_finalize=False)
    for monitor in daemon.monitors:
        monitor.wait("BLOCK_JOB_PENDING", id="job")
    third.run("job-finalize", id="job")
    for monitor in daemon.monitors:
        finish(monitor)
    daemon.quit()
    chain.reads_as_before()


@scenario
def reconnect_to_monitor(case):
    """A client leaves, another one comes; a second one at the same time has to wait for the first."""
    daemon, line = raw(case)
    line.negotiate()
    waiting = socket.socket(socket.AF_UNIX)
    waiting.settimeout(20)
    waiting.connect(daemon.sockets[0])
    line.ask({"execute": "query-version"})
    line.close()
    second = RawMonitor.adopt(case, waiting, "second")
    second.negotiate()
    second.ask({"execute": "query-version"})
    second.close()


@scenario
def half_closed(case):
    """A client that has said all it has to say still gets its answers, or the connection ends; the daemon lives on."""
    daemon, line = raw(case)
    line.negotiate()
    line.send({"execute": "query-version", "id": "last"})
    line.socket.shutdown(socket.SHUT_WR)
    answer = line.read("last", record=False)
    check(answer is None or answer.get("id") == "last", f"instead of an answer: {answer}")
    line.close()
    again = daemon.raw("again", monitor=0)
    again.negotiate()
    again.ask({"execute": "query-version"})


@scenario
def never_reads(case):
    """A client that asks and asks and never reads holds nobody up."""
    daemon, line = raw(case)
    line.negotiate()
    line.socket.setblocking(False)
    command = json.dumps({"execute": "query-qmp-schema"}).encode()
    pushed = 0
    deadline = time.monotonic() + 3
    while pushed < 2000 and time.monotonic() < deadline:
        try:
            line.socket.send(command)
            pushed += 1
        except BlockingIOError:
            break
    other = daemon.monitors[1]
    began = time.monotonic()
    for _ in range(10):
        other.quiet("query-version")
    check(time.monotonic() - began < 10, "another monitor had to wait")
    other.run("query-block-jobs")
    line.close()
    other.run("query-block-jobs")


@scenario
def huge_message(case):
    """A long message is taken; one that is cut off in the middle does no harm."""
    daemon, line = raw(case)
    line.negotiate()
    long = "n" * (96 << 10)
    line.send({"execute": "query-version", "id": long})
    answer = line.read("huge", record=False)
    check(answer is not None and answer.get("id") == long, "a long id didn't come back")
    line.ask({"execute": "blockdev-del", "arguments": {"node-name": "m" * 7000}}, "long name")
    line.send(b'{"execute": "' + b"x" * (96 << 10))
    line.close()
    daemon.monitors[1].run("query-block-jobs")


@scenario
def deep_message(case):
    """Nesting beyond all measure is refused."""
    daemon, line = raw(case)
    line.negotiate()
    line.send(b'{"execute": "query-version", "id": ' + b"[" * 500 + b"]" * 500 + b"}")
    check(line.read("deep", record=False) is not None, "the connection ended")
    line.send(b"[" * 2000 + b"]" * 2000)
    line.send({"execute": "query-version", "id": "after"})
    line.read("deeper")
    # How many errors the rest gives is a matter of taste.
    answer = {}
    while answer is not None and answer.get("id") != "after":
        answer = line.read("deeper", record=False)
    check(answer is not None, "the connection ended")
    line.close()
    daemon.monitors[1].run("query-block-jobs")


@scenario
def queries(case):
    """The commands that tell what the daemon is."""
    qmp = case.daemon().qmp
    version = qmp.run("query-version")
    check(set(version) == {"qemu", "package"}, f"query-version: {version}")
    schema = qmp.quiet("query-qmp-schema")
    commands = {entry["name"] for entry in schema if entry["meta-type"] == "command"}
    listed = {entry["name"] for entry in qmp.quiet("query-commands")}
    check(listed == commands, f"query-commands and the schema differ in {sorted(listed ^ commands)}")
    events = {entry["name"] for entry in schema if entry["meta-type"] == "event"}
    case.note("commands of the suite", sorted(COMMANDS & commands))
    case.note("events of the suite", sorted(EVENTS & events))
    case.note("commands not there", sorted(COMMANDS - commands))


COMMANDS = set(
    """
    block-commit block-export-add block-export-del block-job-cancel block-job-complete
    block-job-dismiss block-job-finalize block-job-pause block-job-resume block-job-set-speed block-set-write-threshold block-stream block_resize
    blockdev-add blockdev-create blockdev-del blockdev-mirror blockdev-reopen blockdev-set-active blockdev-snapshot blockdev-snapshot-sync
    change-backing-file job-cancel job-complete job-dismiss job-finalize job-pause job-resume nbd-server-add nbd-server-remove nbd-server-start
    nbd-server-stop object-add object-del qmp_capabilities qom-get qom-list qom-set query-block-exports query-block-jobs query-commands query-jobs
    query-named-block-nodes query-qmp-schema query-version quit transaction
    """.split()
)
EVENTS = set(
    """
    BLOCK_EXPORT_DELETED BLOCK_JOB_CANCELLED BLOCK_JOB_COMPLETED BLOCK_JOB_ERROR BLOCK_JOB_PENDING BLOCK_JOB_READY BLOCK_WRITE_THRESHOLD
    JOB_STATUS_CHANGE
    """.split()
)


@scenario
def schema(case):
    """The arguments of the commands that the suite uses, from the schema."""
    qmp = case.daemon().qmp
    entries = {entry["name"]: entry for entry in qmp.quiet("query-qmp-schema")}
    for name in sorted(COMMANDS):
        if name in entries:
            members = entries[entries[name]["arg-type"]].get("members", [])
            shown = {m["name"]: kind(entries, m["type"]) + (" optional" if "default" in m else "") for m in members}
            case.note(name, shown)


def kind(entries, name):
    """A type in a word."""
    entry = entries[name]
    if entry["meta-type"] == "array":
        return "[" + kind(entries, entry["element-type"]) + "]"
    return entry.get("json-type") or (entry["meta-type"] if entry["meta-type"] != "enum" else "enum")


@scenario
def quit_twice(case):
    """quit is answered, and then the connection ends."""
    daemon, line = raw(case)
    line.negotiate()
    line.send(b'{"execute": "quit", "id": 1}')
    line.read("quit")
    check(line.line() is None, "something came after the reply to quit")
    check(daemon.ended() == 0, f"the exit status is {daemon.child.returncode}")


def ended_with_job(case, how):
    """Ends a daemon while a stream runs; the image must be whole and the data right."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "top")
    daemon = case.daemon()
    chain.add(daemon.qmp)
    daemon.qmp.run("block-stream", job_id="job", device="top", speed=SLOW)
    idle(daemon.qmp)
    how(daemon)
    daemon.qmp.drain()
    case.note("exit status", daemon.ended())
    check(case.images.backing("top.qcow2")[0], "the link is gone although the stream wasn't done")
    chain.reads_as_before()


@scenario
def quit_with_job(case):
    """quit cancels the job."""

    def leave(daemon):
        daemon.qmp.run("quit")

    ended_with_job(case, leave)


@scenario
def sigterm_with_job(case):
    """SIGTERM does what quit does."""
    ended_with_job(case, lambda daemon: daemon.signal(signal.SIGTERM))


@scenario
def sigint_with_job(case):
    """SIGINT as well."""
    ended_with_job(case, lambda daemon: daemon.signal(signal.SIGINT))


@scenario
def sighup(case):
    """SIGHUP as well."""
    ended_with_job(case, lambda daemon: daemon.signal(signal.SIGHUP))


@scenario
def sigkill_with_job(case):
    """A kill costs nothing but time."""
    ended_with_job(case, lambda daemon: daemon.signal(signal.SIGKILL))


@scenario
def quit_with_ready_commit(case):
    """quit while a commit is ready: both images as they should be."""
    chain = case.images.chain("base", "top")
    daemon = case.daemon()
    qmp = daemon.qmp
    chain.add(qmp)
    qmp.run("block-commit", job_id="job", device="top")
    qmp.wait("BLOCK_JOB_READY", device="job")
    idle(qmp)
    qmp.run("quit")
    case.note("exit status", daemon.ended())
    chain.reads_as_before()


@scenario
def quit_with_pending(case):
    """quit while a job is pending: not finalized."""
    chain = case.images.chain("base", "top")
    daemon = case.daemon()
    qmp = daemon.qmp
    chain.add(qmp)
    qmp.run("block-stream", job_id="job", device="top", auto_finalize=False)
    qmp.wait("BLOCK_JOB_PENDING")
    qmp.run("quit")
    case.note("exit status", daemon.ended())
    case.note("backing", case.images.backing("top.qcow2"))
    chain.reads_as_before()


@scenario
def quit_with_paused(case):
    """quit while a job is paused."""

    def leave(daemon):
        daemon.qmp.run("job-pause", id="job")
        daemon.qmp.wait_status("job", "paused")
        daemon.qmp.run("quit")

    ended_with_job(case, leave)
