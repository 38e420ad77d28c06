"""An HTTP/1.1 server of one file with Range requests, an ETag, keep-alive, a fixed latency for each request, and a line that all connections share.

usage: http_server.py FILE LATENCY_MS [BYTES_PER_SECOND]     prints the URL on its first line, then serves until it is killed
"""

import asyncio
import os
import re
import socket
import sys

RANGE = re.compile(r"bytes=(\d+)-(\d*)$")

# Bytes that pass the line at once.
PIECE = 64 << 10


class Line:
    """Passes so many bytes a second, in the order in which they come; 0 is without limit."""

    def __init__(self, rate):
        self.rate = rate
        self.free_at = 0.0

    def passes(self, count, now):
        """When the last of these bytes has passed, if they come at `now`."""
        self.free_at = max(self.free_at, now) + count / self.rate
        return self.free_at


def answer(method, headers, size):
    """The status line, the headers and the half-open range of bytes for one request."""
    first, last, status = 0, size - 1, "200 OK"
    extra = ""
    if method not in ("GET", "HEAD"):
        return "HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n", 0, 0
    wanted = RANGE.match(headers.get("range", ""))
    if wanted:
        first = int(wanted.group(1))
        last = min(int(wanted.group(2) or last), last)
        if first > last:
            head = f"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{size}\r\nContent-Length: 0\r\n\r\n"
            return head, 0, 0
        status = "206 Partial Content"
        extra = f"Content-Range: bytes {first}-{last}/{size}\r\n"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Length: {last + 1 - first}\r\n{extra}"
        'Accept-Ranges: bytes\r\nETag: "bench"\r\nContent-Type: application/octet-stream\r\n\r\n'
    )
    return head, first, last + 1 if method == "GET" else first


async def serve_one(reader, writer, path, latency, line):
    """One connection: requests one after the other, each answered after the latency."""
    loop = asyncio.get_running_loop()
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while True:
                text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = text.split("\r\n")
                pairs = (line.split(":", 1) for line in lines if ":" in line)
                headers = {name.strip().lower(): value.strip() for name, value in pairs}
                await asyncio.sleep(latency)
                head, first, end = answer(request.split(" ")[0], headers, size)
                writer.write(head.encode("latin-1"))
                await writer.drain()
                step = PIECE if line.rate else max(end - first, 1)
                for at in range(first, end, step):
                    count = min(step, end - at)
                    if line.rate:
                        await asyncio.sleep(line.passes(count, loop.time()) - loop.time())
                    await loop.sendfile(writer.transport, file, at, count)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def main():
    path, latency = sys.argv[1], float(sys.argv[2]) / 1000
    line = Line(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    server = await asyncio.start_server(lambda r, w: serve_one(r, w, path, latency, line), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(f"http://127.0.0.1:{port}/{os.path.basename(path)}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
