"""The command line: options in each of their forms, and what is said about wrong ones."""

import json
import os
import signal
import socket
import subprocess
import time

from drive import check, nbd, scenario
from drive.monitor import PATIENCE, Monitor, RawMonitor
from drive.ports import free_port


def until(condition, what):
    """Waits for something that no message tells."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        check(time.monotonic() < deadline, f"not within {PATIENCE} s: {what}")
        time.sleep(0.01)


@scenario
def help_and_version(case):
    """--help and --version end well and print to stdout."""
    for option in ("--help", "-h", "--version", "-V"):
        status, out, err = case.outcome(option, option)
        check(status == 0 and out and not err, f"{option}: {status}, {out!r}, {err!r}")
    for words in (["--object", "help"], ["--object", "throttle-group,help"], ["--chardev", "help"], ["--export", "help"], ["--blockdev", "help"]):
        case.outcome(" ".join(words), *words)


@scenario
def other_name(case):
    """The program under the name headwater-storage-daemon needs no `daemon`; the reference has but one name."""
    words = case.program
    if len(words) > 1:
        os.symlink(words[0], case.path("headwater-storage-daemon"))
        words = [case.path("headwater-storage-daemon")]
    commands = b'{"execute": "qmp_capabilities"} {"execute": "query-block-jobs", "id": 1} {"execute": "quit"}'
    child = case.spawn([*words, "--chardev", "stdio,id=c", "--monitor", "c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = child.communicate(commands, timeout=PATIENCE)
    case.note("replies", [json.loads(line) for line in out.splitlines()[1:]])
    check(child.returncode == 0, f"exit status {child.returncode}")


@scenario
def wrong_options(case):
    """Each with exit status 1 and a text on stderr."""
    wrong = [
        ["--nonsense"],
        ["stray"],
        ["--blockdev"],
        ["--blockdev", ""],
        ["--blockdev", "driver=file"],
        ["--blockdev", "driver=nonsense,node-name=n"],
        ["--blockdev", "node-name=n"],
        ["--blockdev", "driver=file,node-name=n,filename=/nowhere/at/all"],
        ["--blockdev", "driver=file,node-name=n,filename=x,nonsense=1"],
        ["--blockdev", "driver=null-co,node-name=n,size=large"],
        ["--blockdev", "driver=null-co,node-name=n,read-only=maybe"],
        ["--blockdev", "driver=null-co,node-name=0n"],
        ["--blockdev", "driver=null-co,node-name=a b"],
        ["--blockdev", "driver=null-co"],
        ["--blockdev", "driver=null-co,node-name=n", "--blockdev", "driver=null-co,node-name=n"],
        ["--blockdev", "driver=raw,node-name=n,file=missing"],
        ["--blockdev", "driver=raw,node-name=n,file.driver=null-co,file=missing"],
        ["--blockdev", "{"],
        ["--blockdev", "{}"],
        ["--blockdev", '{"driver": "null-co", "node-name": 5}'],
        ["--blockdev", '{"driver": "null-co", "node-name": "n", "size": "5"}'],
        ["--blockdev", '{"driver": "null-co", "node-name": "n"} x'],
        ["--chardev", "socket,id=c"],
        ["--chardev", "socket,path=x"],
        ["--chardev", "nonsense,id=c"],
        ["--chardev", "socket,id=c,path=x,nonsense=1"],
        ["--chardev", "socket,id=c,path=nowhere/x.sock"],
        ["--chardev", "socket,id=c,path=nowhere/x.sock,server=on,wait=off"],
        ["--chardev", "socket,id=c,path=x,wait=on"],
        ["--chardev", "socket,id=c,path=x,server=on,reconnect=1"],
        ["--chardev", "null,id=c", "--chardev", "null,id=c"],
        ["--monitor", "nothing"],
        ["--monitor", "chardev=nothing"],
        ["--monitor", ""],
        ["--chardev", "null,id=c", "--monitor", "chardev=c,mode=readline"],
        ["--chardev", "null,id=c", "--monitor", "chardev=c,nonsense=1"],
        ["--chardev", "null,id=c", "--monitor", "c", "--monitor", "c"],
        ["--export", "nbd,id=e,node-name=n"],
        ["--export", "type=nonsense,id=e,node-name=n"],
        ["--export", "nbd,node-name=n"],
        ["--export", ""],
        ["--nbd-server", "addr.type=unix,addr.path=n1.sock", "--export", "nbd,id=e,node-name=n"],
        ["--nbd-server", "addr.type=unix,addr.path=n2.sock", "--blockdev", "null-co,node-name=n", "--export", "nbd,id=e,node-name=n,bitmap=b"],
        ["--nbd-server", "addr.type=unix,addr.path=n3.sock", "--blockdev", "null-co,node-name=n", "--export", "nbd,id=e,node-name=n,nonsense=1"],
        ["--nbd-server", "addr.type=unix"],
        ["--nbd-server", "addr.type=nonsense"],
        ["--nbd-server", "addr.type=unix,addr.path=n4.sock", "--nbd-server", "addr.type=unix,addr.path=n5.sock"],
        ["--nbd-server", "addr.type=unix,addr.path=n6.sock,tls-creds=nothing"],
        ["--object", "nonsense,id=o"],
        ["--object", "throttle-group"],
        ["--object", "throttle-group,id=0o"],
        ["--object", "throttle-group,id=o,nonsense=1"],
        ["--object", "throttle-group,id=o,x-bps-total=much"],
        ["--object", "throttle-group,id=o,x-bps-total=1,x-bps-read=1"],
        ["--object", "throttle-group,id=o", "--object", "throttle-group,id=o"],
        ["--object", "secret,id=s"],
        ["--object", "secret,id=s,data=x,file=y"],
        ["--object", "secret,id=s,file=nowhere"],
        ["--object", "tls-creds-x509,id=t,dir=nowhere,endpoint=server"],
        ["--object", "tls-creds-psk,id=t,dir=nowhere,endpoint=server"],
        ["--object", "iothread"],
        ["--pidfile", "nowhere/pid"],
        ["--pidfile"],
    ]
    for words in wrong:
        label = " ".join(words)
        status, out, err = case.outcome(label, *words)
        check(status == 1, f"{label}: exit status {status}")
        check(err.strip(), f"{label}: nothing on stderr")


@scenario
def order(case):
    """Options are carried out in order: what a later one makes isn't there yet, but for --daemonize and --pidfile."""
    unix = "addr.type=unix,addr.path=nbd.sock"
    node = "driver=null-co,node-name=n"
    case.outcome("export before its node", "--nbd-server", unix, "--export", "nbd,id=e,node-name=n", "--blockdev", node)
    case.outcome("export before the server", "--blockdev", node, "--export", "nbd,id=e,node-name=n", "--nbd-server", unix)
    case.outcome("monitor before its chardev", "--monitor", "c", "--chardev", "null,id=c")
    case.outcome("parent before its child", "--blockdev", "raw,node-name=r,file=n", "--blockdev", node)
    case.outcome("throttle before its group", "--blockdev", node, "--blockdev", "throttle,node-name=t,throttle-group=g,file=n", "--object", "throttle-group,id=g")
    case.outcome("a wrong one first", "--nonsense", "--help")
    case.outcome("help first", "--help", "--nonsense")
    case.outcome("version after a wrong node", "--blockdev", "driver=nonsense", "--version")


@scenario
def blockdev_forms(case):
    """Key=value and JSON, nested and by reference, escapes, dashes and equal signs."""
    case.images.qcow2("base.qcow2", "1M")
    case.images.qcow2("a,b=c.qcow2", "1M", "base.qcow2")
    plain = case.path("base.qcow2")
    escaped = case.path("a,b=c.qcow2").replace(",", ",,")
    daemon = case.daemon(
        "--blockdev",
        f"driver=qcow2,node-name=flat,file.driver=file,file.filename={plain},read-only=on,cache.direct=off,cache.no-flush=on",
        "--blockdev",
        f"qcow2,node-name=comma,file.driver=file,file.filename={escaped},backing=flat",
        "--blockdev",
        json.dumps({"driver": "null-co", "node-name": "json", "size": 1048576, "read-zeroes": True}),
        "--blockdev",
        "raw,node-name=referring,file=json,offset=4096,size=8192",
        "--blockdev=null-aio,node-name=equals,size=1048576",
        "--blockdev",
        json.dumps({"driver": "raw", "node-name": "nested", "file": {"driver": "null-co", "node-name": "inner", "size": 4096}, "read-only": True}),
        "--blockdev",
        "driver=raw,node-name=off,file.driver=null-co,file.size=65536,detect-zeroes=on,discard=unmap",
    )
    daemon.qmp.run("query-named-block-nodes", flat=True)


@scenario
def exports_from_options(case):
    """--nbd-server and --export in their forms."""
    path = case.images.raw("disk.raw", "1M", 4)
    daemon = case.daemon(
        "--blockdev",
        f"driver=file,node-name=disk,filename={path}",
        "--nbd-server",
        f"addr.type=unix,addr.path={case.path('nbd.sock')},max-connections=5",
        "--export",
        "type=nbd,id=one,node-name=disk,name=first,writable=on,description=the first",
        "--export",
        "nbd,id=two,node-name=disk",
        "--export",
        json.dumps({"type": "nbd", "id": "three", "node-name": "disk", "name": "third", "allocation-depth": True}),
    )
    daemon.qmp.run("query-block-exports")
    case.note("list", nbd.listing(nbd.uri(case.path("nbd.sock"))))
    nbd.io(nbd.uri(case.path("nbd.sock"), "first"), "read -P 4 0 1M", "write -P 5 0 64k")
    nbd.io(nbd.uri(case.path("nbd.sock"), "disk"), "read -P 5 0 64k", read_only=True)


@scenario
def nbd_server_inet(case):
    """--nbd-server on TCP."""
    port = free_port(case)
    daemon = case.daemon(
        "--blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on", "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}", "--export", "nbd,id=e,node-name=n"
    )
    nbd.io(nbd.uri(("127.0.0.1", port), "n"), "read -P 0 0 1M", read_only=True)
    daemon.qmp.run("query-block-exports")


@scenario
def objects(case):
    """--object in its forms."""
    daemon = case.daemon(
        "--object",
        "throttle-group,id=old,x-iops-total=100,x-bps-read=1048576",
        "--object",
        "qom-type=throttle-group,id=dotted,limits.iops-total=7,limits.iops-total-max=9,limits.iops-total-max-length=3",
        "--object",
        json.dumps({"qom-type": "throttle-group", "id": "json", "limits": {"bps-write": 5}}),
        "--object",
        "secret,id=word,data=letmein",
        "--object",
        "iothread,id=thread",
    )
    qmp = daemon.qmp
    for name in ("old", "dotted", "json"):
        qmp.run("qom-get", path=f"/objects/{name}", property="limits")
    qmp.run("qom-list", path="/objects")
    qmp.refuse("object-add", qom_type="throttle-group", id="old")


@scenario
def tcp_chardev(case):
    """A monitor on TCP, as a server."""
    port = free_port(case)
    case.daemon("--chardev", f"socket,id=tcp,host=127.0.0.1,port={port},server=on,wait=off", "--monitor", "tcp")
    line = RawMonitor(case, ("127.0.0.1", port), "tcp")
    line.negotiate()
    line.ask({"execute": "query-version"})
    line.close()


@scenario
def bare_words(case):
    """server and wait without =on."""
    path = case.path("bare.sock")
    case.daemon("--chardev", f"socket,id=bare,path={path},server,nowait", "--monitor", "chardev=bare,mode=control,pretty=off")
    line = RawMonitor(case, path, "bare")
    line.negotiate()
    line.close()


@scenario
def pretty(case):
    """pretty=on: replies over several lines."""
    path = case.path("pretty.sock")
    case.daemon("--chardev", f"socket,id=p,path={path},server=on,wait=off", "--monitor", "chardev=p,pretty=on")
    line = RawMonitor(case, path, "pretty", greet=False)
    text = b""
    while not text.rstrip().endswith(b"\n}"):
        text += line.line() + b"\n"
    check(json.loads(text)["QMP"], "no greeting")
    line.send(b'{"execute": "qmp_capabilities"}\n{"execute": "query-version"}\n')
    text = b""
    while text.count(b"}") < 3 or not text.rstrip().endswith(b"}"):
        text += line.line() + b"\n"
        if b'"package"' in text and text.rstrip().endswith(b"\n}"):
            break
    case.note("pretty", [word.split(b":")[0].decode() for word in text.splitlines() if b"package" not in word])
    line.close()


@scenario
def client_chardev(case):
    """A chardev that connects to somebody who listens."""
    path = case.path("listener.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(PATIENCE)
        daemon = case.daemon("--chardev", f"socket,id=out,path={path}", "--monitor", "out")
        line = RawMonitor.adopt(case, listener.accept()[0], "out")
        line.negotiate()
        line.ask({"execute": "query-version"})
        line.close()
        daemon.qmp.run("query-block-jobs")


@scenario
def reconnecting_chardev(case):
    """reconnect: tries until somebody listens, and again when the connection ends."""
    path = case.path("listener.sock")
    daemon = case.daemon("--chardev", f"socket,id=out,path={path},reconnect-ms=100", "--monitor", "out")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(PATIENCE)
        for name in ("first", "second"):
            line = RawMonitor.adopt(case, listener.accept()[0], name)
            line.negotiate()
            line.ask({"execute": "query-version"})
            line.close()
    daemon.qmp.run("query-block-jobs")


@scenario
def reconnect_seconds(case):
    """reconnect in seconds, over TCP."""
    port = free_port(case)
    case.daemon("--chardev", f"socket,id=out,host=127.0.0.1,port={port},reconnect=1", "--monitor", "out")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        listener.settimeout(PATIENCE)
        line = RawMonitor.adopt(case, listener.accept()[0], "out")
        line.negotiate()
        line.close()


@scenario
def waiting_server(case):
    """wait=on, the default of a server: nothing after it is done until a client is there."""
    path, pidfile = case.path("wait.sock"), case.path("pid")
    child = case.launch("--chardev", f"socket,id=c,path={path},server=on", "--monitor", "c", "--pidfile", pidfile, stderr=subprocess.DEVNULL)
    until(lambda: os.path.exists(path), "the socket")
    time.sleep(0.2)
    check(not os.path.exists(pidfile), "the pid file is there although nobody came")
    until(lambda: listening(path), "somebody listens")
    line = RawMonitor(case, path, "waited")
    line.negotiate()
    until(lambda: os.path.exists(pidfile), "the pid file")
    line.ask({"execute": "quit"})
    line.close()
    check(child.wait(PATIENCE) == 0, f"exit status {child.returncode}")
    check(not os.path.exists(pidfile), "the pid file is still there")


def listening(path):
    """Whether somebody listens on a Unix socket."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        return any(line.rstrip().endswith(" " + path) and line.split()[3] == "00010000" for line in table)


@scenario
def stdio(case):
    """A monitor on standard input and output."""
    child = case.launch("--chardev", "stdio,id=c", "--monitor", "c", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    commands = [{"execute": "qmp_capabilities"}, {"execute": "query-block-jobs", "id": 1}, {"execute": "quit"}]
    out, _ = child.communicate(b"".join(json.dumps(command).encode() for command in commands), timeout=PATIENCE)
    lines = [json.loads(line) for line in out.splitlines()]
    check(lines[0].pop("QMP", None), "no greeting")
    case.note("replies", lines[1:])
    case.note("exit status", child.returncode)


@scenario
def stdio_twice(case):
    """Standard input has one user."""
    case.outcome("stdio twice", "--chardev", "stdio,id=a", "--chardev", "stdio,id=b")


@scenario
def pidfile(case):
    """The pid file: its content, and that it is gone afterwards."""
    path = case.path("own.pid")
    daemon = case.daemon("--pidfile", path)
    # The harness gives one as well; the last one counts.
    case.note("first of two", os.path.exists(path))
    with open(case.path("daemon0.pid"), encoding="ascii") as file:
        text = file.read()
    check(text == f"{daemon.pid}\n", f"the pid file has {text!r}, the pid is {daemon.pid}")
    daemon.signal(signal.SIGTERM)
    check(not os.path.exists(case.path("daemon0.pid")), "the pid file is still there")


@scenario
def pidfile_in_use(case):
    """A pid file that another daemon holds."""
    daemon = case.daemon()
    case.transcript.hide(str(daemon.pid), "<pid>")
    case.outcome("held", "--pidfile", case.path("daemon0.pid"))
    check(os.path.exists(case.path("daemon0.pid")), "the pid file of the first one is gone")


@scenario
def stale_pidfile(case):
    """A pid file that nobody holds is overwritten."""
    with open(case.path("daemon0.pid"), "w", encoding="ascii") as file:
        file.write("4194303000000\n")
    path = case.path("stale.sock")
    child = case.launch("--pidfile", case.path("daemon0.pid"), "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "c")
    until(lambda: open(case.path("daemon0.pid"), encoding="ascii").read() == f"{child.pid}\n", "the pid file")
    monitor = Monitor(case, path, "daemon")
    monitor.run("quit")
    check(child.wait(PATIENCE) == 0, f"exit status {child.returncode}")


@scenario
def daemonize(case):
    """--daemonize: the parent ends once all is set up, and the sockets are there."""
    path, pidfile = case.path("qmp.sock"), case.path("pid")
    words = ["--daemonize", "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "c", "--pidfile", pidfile]
    status, out, err = case.outcome("parent", *words)
    check(status == 0, f"the parent ended with {status}: {err}")
    with open(pidfile, encoding="ascii") as file:
        pid = int(file.read())
    case.defer(lambda: end(pid))
    check(os.getsid(pid) == pid or os.getsid(pid) != os.getsid(0), "the child is in our session")
    case.note("working directory", os.readlink(f"/proc/{pid}/cwd"))
    case.note("stdin", os.readlink(f"/proc/{pid}/fd/0"))
    monitor = Monitor(case, path, "daemon")
    monitor.run("query-block-jobs")
    monitor.run("quit")
    until(lambda: not os.path.exists(f"/proc/{pid}") or state(pid) == "Z", "the end of the daemon")
    check(not os.path.exists(pidfile), "the pid file is still there")


def state(pid):
    """The state of a process, as a letter."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def end(pid):
    """Ends a daemon that this scenario started, if it still runs."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@scenario
def daemonize_fails(case):
    """With a wrong option the parent tells, and ends with 1."""
    status, _, err = case.outcome("parent", "--daemonize", "--blockdev", "driver=file,node-name=n,filename=/nowhere/at/all")
    check(status == 1 and err, f"{status}, {err!r}")
    case.outcome("stdio", "--daemonize", "--chardev", "stdio,id=c", "--monitor", "c")


@scenario
def long_and_short(case):
    """Options with one dash, abbreviated, with =."""
    for words in (["-version"], ["--vers"], ["--blockd", "null-co,node-name=n", "--version"], ["--version=1"], ["--help=x"]):
        case.outcome(" ".join(words), *words, text=False)


@scenario
def image_in_use(case):
    """An image that another process writes to: the one who typed the command is told what may be the reason."""
    path = case.images.qcow2("disk.qcow2", "1M")
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={path}"
    case.daemon("--blockdev", node)
    case.outcome("in use", "--blockdev", node)
