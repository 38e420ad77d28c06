"""The images of a walk: made with QEMU's tools, and looked at with them when the daemon is gone."""

import json
import os
import subprocess

from walks import nbd
from walks.disk import UNIT, Disk, pattern, serials
from walks.world import Image


def tool(walk, *words):
    """Runs one of QEMU's tools; gives its exit status and output."""
    done = subprocess.run(words, cwd=walk.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    return done.returncode, done.stdout.decode(errors="replace")


def make(walk, action):
    """Makes an image as an action says."""
    name, form, units = action["name"], action["form"], action["units"]
    world = walk.world
    if name in world.images:
        return
    disk = Disk(units)
    header = action.get("backing")
    if action.get("fill"):
        with open(walk.path(name + ".raw"), "wb") as file:
            # Some of it is data, the rest is a hole.
            for first in range(0, units, 96):
                value = next(serials)
                count = min(64, units - first)
                file.seek(first * UNIT)
                file.write(b"".join(pattern(value, first + at) for at in range(count)))
                for at in range(count):
                    disk.history[first + at] = [(float("-inf"), float("-inf"), frozenset([value]))]
            file.truncate(units * UNIT)
    if form == "raw":
        if action.get("fill"):
            os.rename(walk.path(name + ".raw"), walk.path(name))
        else:
            with open(walk.path(name), "wb") as file:
                file.truncate(units * UNIT)
    else:
        options = f"cluster_size={action.get('cluster', 65536)}"
        if action.get("fill"):
            words = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, name + ".raw", name]
        else:
            backing = ["-b", header, "-F", world.images[header].form] if header in world.images else []
            words = ["create", "-q", "-f", "qcow2", "-o", options, *backing, name, str(units * UNIT)]
        status, out = tool(walk, "qemu-img", *words)
        if status:
            walk.told(f"qemu-img {words}: {out}")
            return
        if action.get("fill"):
            os.unlink(walk.path(name + ".raw"))
    fresh = form == "qcow2" and not action.get("fill")
    # What an overlay reads as is known when it is opened on something.
    world.images[name] = Image(name, form, disk, header=header if header in world.images else None, fresh=fresh)


async def read_all(walk):
    """Reads what is exported, with nobody else there."""
    for export in list(walk.world.exports.values()):
        disk = walk.world.disk_of(export)
        if disk is None or export.odd:
            continue
        try:
            client = await nbd.Client.connect(walk.path("nbd.sock"), export.name)
        except nbd.Lost as error:
            walk.fail(f"{export.name}: {error}")
            continue
        now = walk.clock()
        try:
            data = await client.request(nbd.READ, 0, client.size)
        except (nbd.Lost, nbd.Refused) as error:
            walk.fail(f"{export.name}: {error}")
            continue
        client.close()
        if client.size != disk.units * UNIT and disk.is_known():
            walk.fail(f"{export.name} has {client.size} bytes, should have {disk.units * UNIT}")
        wrong = disk.wrong(0, data, now, now)
        if wrong:
            walk.fail(f"{export.name} (node {export.node}), read at the end: {wrong}")


def check_all(walk, killed=False):
    """Checks every image that something is known of."""
    now = walk.clock()
    for image in walk.world.images.values():
        if image.form == "qcow2":
            status, out = tool(walk, "qemu-img", "check", "-f", "qcow2", image.name)
            if status and not (killed and status == 3):
                walk.fail(f"qemu-img check {image.name}: {out}")
        if image.disk.is_known() and not image.doubts and (image.below in walk.world.images or image.below is None) and not (image.fresh and image.header):
            compare(walk, image, now)


def description(walk, image):
    """Options of an image and those below it, as the walk knows them."""
    options = {"driver": image.form, "file": {"driver": "file", "filename": walk.path(image.name)}}
    if image.form == "qcow2":
        below = walk.world.images.get(image.below)
        options["backing"] = description(walk, below) if below else None
    return options


def compare(walk, image, now):
    """Compares what an image reads as with what it should. By its header, if that should be right."""
    chain = walk.world.under(image)
    by_header = all(one.header == one.below for one in chain)
    source = ["-f", image.form, image.name] if by_header else ["json:" + json.dumps(description(walk, image))]
    status, out = tool(walk, "qemu-img", "convert", "-O", "raw", *source, "out.raw")
    if status:
        walk.fail(f"qemu-img convert {image.name} (on {[one.name for one in chain[1:]]}): {out}")
        return
    with open(walk.path("out.raw"), "rb") as file:
        data = file.read()
    if len(data) != image.disk.units * UNIT:
        walk.fail(f"{image.name} has {len(data)} bytes, should have {image.disk.units * UNIT}")
    wrong = image.disk.wrong(0, data[: image.disk.units * UNIT], now, now)
    if wrong:
        names = [one.name for one in chain]
        walk.fail(f"{image.name} (chain {names}, {'by its header' if by_header else 'put together'}): {wrong}")
