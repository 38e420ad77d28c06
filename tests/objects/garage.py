"""Garage, an object store of several nodes, on this machine: started, broken and ended by the tests.

It is a program beside headwater that speaks S3; nothing of it is linked or kept in the tree. scripts/setup installs it.
"""

import contextlib
import http.client
import os
import pathlib
import socket
import subprocess
import time

import s3

TREE = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = TREE / "target" / "tools" / "garage" / "bin" / "garage"
REGION = "garage"
KEY = ("GK0123456789abcdef01234567", "5ec7e7" + "0f" * 29)
BUCKET = "images"
PATIENCE = 60

CONFIG = """
metadata_dir = "{directory}/meta"
data_dir = "{directory}/data"
db_engine = "lmdb"
replication_factor = 3
compression_level = "none"
metadata_fsync = false
rpc_bind_addr = "127.0.0.1:{rpc}"
rpc_public_addr = "127.0.0.1:{rpc}"
rpc_secret = "{secret}"
[s3_api]
s3_region = "{region}"
api_bind_addr = "127.0.0.1:{api}"
"""


class Failed(Exception):
    """A test's failure."""


def check(condition, what):
    if not condition:
        raise Failed(what)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Node:
    """One of the store's servers."""

    def __init__(self, directory, rpc, api):
        directory.mkdir()
        self.directory, self.api = directory, api
        self.endpoint = f"http://127.0.0.1:{api}"
        self.config = directory / "garage.toml"
        self.config.write_text(CONFIG.format(directory=directory, rpc=rpc, api=api, secret="ab" * 32, region=REGION))
        self.config.chmod(0o600)
        self.child = None
        self.start()

    def start(self):
        """Starts it, also again."""
        with open(self.directory / "log", "ab") as log:
            environment = {**os.environ, "RUST_LOG": "garage=warn"}
            command = [PROGRAM, "-c", self.config, "server"]
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        end = time.monotonic() + PATIENCE
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.api)) == 0:
                    return
            check(self.child.poll() is None and time.monotonic() < end, f"garage doesn't start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self):
        """Ends it as a power cut would."""
        self.child.kill()
        self.child.wait()

    def tell(self, *words):
        """A command to the store, through this node."""
        done = subprocess.run([PROGRAM, "-c", self.config, *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
        check(done.returncode == 0, f"garage {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout


class Cluster:
    """Three nodes that each have everything."""

    def __init__(self, directory):
        ports = free_ports(6)
        self.nodes = []
        try:
            for number in range(3):
                self.nodes.append(Node(directory / f"node{number}", ports[2 * number], ports[2 * number + 1]))
            self._join()
        except BaseException:
            self.end()
            raise
        self.client = s3.Client(self.nodes[0].endpoint, REGION, KEY)

    def _join(self):
        first = self.nodes[0]
        names = [node.tell("node", "id", "-q").strip() for node in self.nodes]
        for name in names[1:]:
            first.tell("node", "connect", name)
        for number, name in enumerate(names):
            first.tell("layout", "assign", "-z", f"zone{number}", "-c", "4GB", name.split("@")[0])
        first.tell("layout", "apply", "--version", "1")
        first.tell("key", "import", "--yes", *KEY)
        first.tell("bucket", "create", BUCKET)
        first.tell("bucket", "allow", "--read", "--write", BUCKET, "--key", KEY[0])

    def put(self, key, path):
        """Uploads a file."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                status, said = self.client.put(BUCKET, key, path.read_bytes())
            except (OSError, http.client.HTTPException) as error:
                # A node that has just been started refuses before it has read what it is sent.
                status, said = 0, str(error)
            if status == 200:
                return
            # A layout takes a moment to be everywhere.
            check(time.monotonic() < end, f"upload of {key}: {status} {said}")
            time.sleep(0.2)

    def heal(self):
        """Starts the nodes that are dead, and waits until all see each other."""
        for node in self.nodes:
            if node.child.poll() is not None:
                node.start()
        end = time.monotonic() + PATIENCE
        while self.nodes[1].tell("status").split("==== FAILED")[0].count("127.0.0.1:") < 3:
            check(time.monotonic() < end, "the nodes don't find each other again")
            time.sleep(0.2)

    def end(self):
        for node in self.nodes:
            if node.child is not None and node.child.poll() is None:
                node.kill()
