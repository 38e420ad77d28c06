"""TCP ports for scenarios."""

import socket


def free_port(case):
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    case.transcript.hide(str(port), "<port>")
    return port
