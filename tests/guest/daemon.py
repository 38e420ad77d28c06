"""headwater, serving a disk to a guest."""

import os
import signal
import subprocess
import time

from machine import check


class Daemon:
    """`headwater` with these words; it says where it serves when it does."""

    def __init__(self, program, log, *words):
        self._command = [str(word) for word in (program, *words)]
        self._log = log
        self.child = None
        self._start = 0
        self.start()

    def start(self):
        """Starts it, also again."""
        with open(self._log, "ab") as out:
            start = out.tell()
            self.child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._start = start
        self.wait_to_say("serving")

    def wait_to_say(self, text):
        """Waits until it has said this since it was started."""
        end = time.monotonic() + 30
        while text.encode() not in self._said(self._start):
            check(self.child.poll() is None, f"headwater ended: {self._said(self._start).decode()}")
            check(time.monotonic() < end, f"headwater doesn't say '{text}'")
            time.sleep(0.01)

    def _said(self, start):
        with open(self._log, "rb") as log:
            log.seek(start)
            return log.read()

    def kill(self):
        """Ends it as a power cut would."""
        self.child.kill()
        self.child.wait()

    def stop(self):
        """Ends it in order."""
        self.child.send_signal(signal.SIGINT)
        check(self.child.wait(60) == 0, f"headwater failed: {self._said(0).decode()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            os.kill(self.child.pid, signal.SIGKILL)
            self.child.wait()
