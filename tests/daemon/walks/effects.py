"""What a command does to the world, once it is answered."""

import os

from walks.disk import UNIT, Disk
from walks.world import FILTERS, Export, Image, Job, Node

# Commands that begin a job, and what its kind is called.
JOBS = {"block-stream": "stream", "block-commit": "commit", "blockdev-mirror": "mirror", "blockdev-backup": "backup"}


def before(world, command, args):
    """Called as a command is sent; gives what `after` takes."""
    now = world.clock()
    if command in JOBS:
        return now, _job(world, JOBS[command], args, now)
    if command == "transaction":
        jobs = [_job(world, "backup", one["data"], now) for one in args["actions"] if one["type"] == "blockdev-backup"]
        return now, jobs
    if command.endswith("job-complete") and (job := world.jobs.get(args.get("id") or args.get("device"))):
        # Its end may be told before the answer.
        job.asked.append("complete")
    return now, None


def _job(world, kind, args, now):
    source = args.get("top-node") or args["device"]
    job = Job(args["job-id"], kind, source, None, now, device=args["device"])
    if kind == "stream":
        job.target = args.get("base-node")
        if "bottom" in args and args["bottom"] in world.nodes:
            bottom = world.nodes[args["bottom"]]
            job.target = bottom.child or bottom.backing
    elif kind == "commit":
        chain = [name for name in world.chain(source) if not world.nodes[name].child]
        job.target = args.get("base-node") or (chain[-1] if chain else None)
        job.active = world.layer(source) is world.layer(args["device"])
    else:
        job.target = args["target"]
        job.whole = args["sync"] == "full"
    if job.name in world.jobs:
        # It will be refused, and its target is left alone.
        return None
    world.begin(job)
    return job


def after(world, command, args, error, memory):
    """Called with the answer of a command."""
    sent, began = memory
    if command in JOBS:
        if began:
            world.refused(began) if error else world.started(began)
        return
    if error and command.endswith("job-complete") and (job := world.jobs.get(args.get("id") or args.get("device"))):
        job.asked.remove("complete")
    if error:
        for job in began or []:
            if job:
                world.refused(job)
        return
    handler = HANDLERS.get(command)
    if handler:
        handler(world, args, sent)
    for job in began or []:
        if job:
            world.started(job)


def _add(world, args, _sent=None, owned=True):
    """A node, with those that are defined in place."""
    name = args.get("node-name")
    driver = args["driver"]
    node = Node(name or f"#{id(args)}", driver, owned=owned)

    def inner(key):
        value = args.get(key)
        return _add(world, value, owned=False).name if isinstance(value, dict) else value

    if driver in FILTERS:
        node.child = inner("image" if driver == "blkdebug" else "file")
    elif driver == "file":
        node.image = _image(world, args["filename"])
        if node.image and node.image.form != "raw":
            node.image = None
    elif driver == "raw":
        file = inner("file")
        node.image = world.resolve(file)
    elif driver == "qcow2":
        node.image = _image(world, _filename(args["file"], world))
        node.backing = inner("backing")
        _found(world, node, "backing" in args)
    elif driver == "null-co":
        node.image = Image(node.name, "null", Disk.unknown(args.get("size", 0) // UNIT))
    node.file = args.get("file")
    if not node.name.startswith("#") or not owned:
        world.nodes[node.name] = node
    node.filename = args.get("filename", "")
    return node


def _filename(file, world):
    """The name of the file that an image's option `file` comes to."""
    while isinstance(file, (dict, str)):
        if isinstance(file, str):
            node = world.nodes.get(file)
            if node is None:
                return ""
            if node.child:
                file = node.child
                continue
            return node.filename
        if "filename" in file:
            return file["filename"]
        file = file.get("file") or file.get("image")
    return ""


def _image(world, filename):
    return world.images.get(os.path.basename(filename))


def _found(world, node, explicit):
    """An image is opened: does it stand on what it stood on when its content was right?"""
    image = node.image
    if not image:
        return
    if explicit:
        backing = world.resolve(node.backing) if node.backing else None
        stands_on = backing.name if backing else None
        if node.backing and not backing:
            image.disk = Disk.unknown(image.disk.units)
    else:
        stands_on = image.header
        if image.header:
            node.backing = f"#{image.name}-backing"
            below = world.images[image.header]
            inner = Node(node.backing, below.form, below, owned=False)
            world.nodes[node.backing] = inner
            if below.form == "qcow2":
                _found(world, inner, False)
    if stands_on == image.below:
        return
    if image.fresh and stands_on and stands_on in world.images:
        # An empty overlay shows what it is put on.
        image.below = stands_on
        under = world.images[stands_on].disk
        copy = under.frozen(world.clock(), world.clock())
        copy.resize(image.disk.units, world.clock())
        image.disk = copy
        return
    if image.fresh and stands_on is None:
        return
    image.below = stands_on
    image.disk = Disk.unknown(image.disk.units)


def _del(world, args, _sent):
    world.nodes.pop(args["node-name"], None)


def _snapshot(world, args, sent):
    world.snapshot(args["node"], args["overlay"], sent)


def _snapshot_sync(world, args, sent):
    name = os.path.basename(args["snapshot-file"])
    below = world.resolve(args["node-name"])
    if not below:
        return
    image = Image(name, "qcow2", Disk(below.disk.units), header=below.name, below=below.name, fresh=True)
    world.images[name] = image
    overlay = Node(args["snapshot-node-name"], "qcow2", image, owned=False)
    overlay.file = {"driver": "file", "filename": name}
    world.nodes[overlay.name] = overlay
    world.snapshot(args["node-name"], args["snapshot-node-name"], sent)


def _transaction(world, args, sent):
    for action in args["actions"]:
        handler = HANDLERS.get(action["type"])
        if handler:
            handler(world, action["data"], sent)


def _reopen(world, args, _sent):
    for options in args["options"]:
        node = world.nodes.get(options["node-name"])
        if node and "backing" in options and node.driver == "qcow2":
            node.backing = options["backing"]
            _found(world, node, True)


def _export_add(world, args, _sent):
    world.exports[args["id"]] = Export(args["id"], args["node-name"], bool(args.get("writable")))
    image = world.resolve(args["node-name"])
    if image and args.get("writable"):
        image.fresh = False
        world.changes(image)


def _export_del(world, args, _sent):
    world.exports.pop(args["id"], None)


def _resize(world, args, _sent):
    image = world.resolve(args["node-name"])
    if image:
        world.changes(image)
        image.disk.resize(args["size"] // UNIT, world.clock())


def _group(world, args, _sent):
    if args.get("qom-type") == "throttle-group":
        world.groups.add(args["id"])


def _change_backing_file(world, args, _sent):
    image = world.resolve(args["image-node-name"])
    if image:
        image.header = os.path.basename(args["backing-file"])


HANDLERS = {
    "blockdev-add": _add,
    "blockdev-del": _del,
    "blockdev-snapshot": _snapshot,
    "blockdev-snapshot-sync": _snapshot_sync,
    "transaction": _transaction,
    "blockdev-reopen": _reopen,
    "block-export-add": _export_add,
    "block-export-del": _export_del,
    "block_resize": _resize,
    "object-add": _group,
    "change-backing-file": _change_backing_file,
}
