"""The images that the benchmarks read, made once and kept between runs."""

import os
import random
import subprocess

MIB = 1 << 20
GIB = 1 << 30


def qemu(*words, script=None):
    """Runs a QEMU tool, quietly."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, input=script, text=True)


def raw(path, size):
    """A raw file full of bytes that no tool finds zero or compresses."""
    if os.path.exists(path) and os.path.getsize(path) == size:
        return path
    # A small block: the kernel counts this process's peak as its children's, until theirs is higher.
    block = random.Random(size).randbytes(MIB)
    with open(path + ".part", "wb") as file:
        for at in range(0, size, len(block)):
            file.write(block[: min(len(block), size - at)])
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".part", path)
    return path


def qcow2(path, size, data, zeroes):
    """A qcow2 of `size` bytes: first `data` bytes of data, then `zeroes` bytes of zero clusters, then nothing."""
    if os.path.exists(path):
        return path
    plain = raw(path + ".raw", data)
    qemu("qemu-img", "convert", "-t", "none", "-O", "qcow2", plain, path + ".part")
    os.unlink(plain)
    qemu("qemu-img", "resize", "-q", path + ".part", str(size))
    if zeroes:
        qemu("qemu-io", "-c", f"write -z {data} {zeroes}", path + ".part")
    os.rename(path + ".part", path)
    return path


def overlay(path, backing):
    """An empty overlay, made anew."""
    if os.path.exists(path):
        os.unlink(path)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, path)
    return path


def chain(folder, size, depth):
    """A chain of `depth` images whose 1 MiB stripes take turns in holding the data. Returns the top."""
    below = qcow2(os.path.join(folder, f"chain-{size}-0.qcow2"), size, size, 0)
    for level in range(1, depth):
        path = os.path.join(folder, f"chain-{size}-{level}.qcow2")
        if not os.path.exists(path):
            overlay(path + ".part", below)
            stripes = range(level * MIB, size, depth * MIB)
            writes = "".join(f"write -q -P {level} {at} 1M\n" for at in stripes)
            qemu("qemu-io", "-t", "none", path + ".part", script=writes)
            os.rename(path + ".part", path)
        below = path
    return below


def compare(a, a_format, b, b_format):
    """Fails unless two images hold the same bytes."""
    subprocess.run(["qemu-img", "compare", "-q", "-f", a_format, "-F", b_format, a, b], check=True)
