"""What must be true of images, nodes and exports, as far as answers and events of the daemon tell."""

from dataclasses import dataclass, field

from walks.disk import Disk

FILTERS = ("throttle", "copy-on-read", "blkdebug")


@dataclass(eq=False)
class Image:
    """A file on disk, and what it reads as through the images below it."""

    name: str
    form: str
    disk: Disk
    header: str | None = None  # the image that the header names as backing
    below: str | None = None  # the image that it stood on when its content was last right
    fresh: bool = False  # it holds nothing of its own
    doubts: int = 0  # jobs that write to it, or may, so that nobody knows what it holds


@dataclass(eq=False)
class Node:
    """A node that a command made."""

    name: str
    driver: str
    image: Image | None = None
    child: str | None = None  # what a filter is on
    backing: str | None = None
    owned: bool = True
    filename: str = ""
    file: dict | str | None = None  # the option of that name


@dataclass(eq=False)
class Job:
    """A job, from when its command is sent."""

    name: str
    kind: str
    source: str  # for a commit the top
    target: str | None  # for a commit the base, for a stream what remains
    sent: float = 0
    device: str | None = None
    active: bool = False
    whole: bool = True  # its target becomes what the source is
    asked: list = field(default_factory=list)  # "complete" for each time that it was told so and did not refuse
    captured: Disk | None = None  # of a backup: what the source held
    doubted: list = field(default_factory=list)  # the images that it changes
    ending: float | None = None  # when it was told to complete, or to end as it is


@dataclass(eq=False)
class Export:
    """A way for clients to a node."""

    name: str
    node: str
    writable: bool
    odd: bool = False  # its disk got another size under its clients


class World:
    """All of it. Names are those of the walk: a file's name in its folder, a node's, a job's."""

    def __init__(self, clock):
        self.clock = clock
        self.images = {}
        self.nodes = {}
        self.jobs = {}
        self.exports = {}
        self.groups = set()

    def resolve(self, name):
        """The image that requests to a node come to, or None."""
        seen = self.nodes.get(name)
        while seen and seen.child:
            seen = self.nodes.get(seen.child)
        return seen.image if seen else None

    def layer(self, name):
        """The node below all filters."""
        seen = self.nodes.get(name)
        while seen and seen.child:
            seen = self.nodes.get(seen.child)
        return seen

    def disk_of(self, export):
        """What clients of an export see."""
        image = self.resolve(export.node)
        return image.disk if image and not image.doubts else None

    def writable_disk(self, export):
        """What clients of an export change, whether or not it is known."""
        image = self.resolve(export.node)
        return image.disk if image else None

    def chain(self, name):
        """The nodes from `name` down, as a job walks them."""
        found = []
        while name and name in self.nodes and name not in found:
            found.append(name)
            node = self.nodes[name]
            name = node.child or node.backing
        return found

    def parents(self, name):
        """The nodes on top of a node."""
        return [node for node in self.nodes.values() if name in (node.child, node.backing)]

    def under(self, image):
        """An image and those below it, by what it stood on."""
        found = []
        while image and image not in found:
            found.append(image)
            image = self.images.get(image.below)
        return found

    def live(self):
        """The images that clients see something of: nobody may change one below another of these."""
        found = set()
        for export in self.exports.values():
            for image in self.under(self.resolve(export.node)):
                found.add(image.name)
        return found

    def changes(self, image):
        """An image gets another content. What stands on it without being in use isn't what it was; the rest is the daemon's to protect."""
        live = self.live()
        for other in self.images.values():
            if other is not image and other.name not in live and image in self.under(other):
                other.disk = Disk.unknown(other.disk.units)

    def move(self, source, target, since, until):
        """A disk goes on in another image; the first one keeps what it held at that moment. Those who went along are linked to the other already."""
        target.fresh = False
        if any(export.writable and self.resolve(export.node) is source for export in self.exports.values()):
            # They are on the image itself, below a filter that others were on: whose writes went where isn't known.
            source.disk, target.disk = Disk.unknown(source.disk.units), Disk.unknown(source.disk.units)
            return
        disk = Disk.unknown(source.disk.units) if source.doubts else source.disk
        source.disk = disk.frozen(since, until)
        target.disk = disk

    def relink(self, old, new):
        """Whoever used a node uses another one."""
        for node in self.nodes.values():
            if node.name != new and node.child == old:
                node.child = new
            elif node.name != new and node.backing == old:
                node.backing = new
        for export in self.exports.values():
            if export.node == old:
                export.node = new

    def snapshot(self, node, overlay, sent):
        """An overlay has taken a node's place."""
        source, target = self.resolve(node), self.resolve(overlay)
        if not source or not target:
            return
        now = self.clock()
        fresh, units = target.fresh, target.disk.units
        if units != source.disk.units:
            for export in self.exports.values():
                export.odd = export.odd or self.resolve(export.node) is source
        self.relink(node, overlay)
        self.nodes[overlay].backing = node
        self.move(source, target, sent, now)
        if not fresh:
            target.disk = Disk.unknown(target.disk.units)
        target.disk.resize(units, now)
        target.below = source.name

    def gone(self, names):
        """Takes out nodes that are no longer there; gives those that should be."""
        lost = [node for node in self.nodes.values() if node.name in names and not node.name.startswith("#")]
        for node in lost:
            del self.nodes[node.name]
        return [node.name for node in lost if node.owned]

    # Jobs

    def begin(self, job):
        """A job's command is on its way: from now on its target may hold anything."""
        self.jobs[job.name] = job
        target = self.resolve(job.target) if job.kind != "stream" else None
        if target:
            job.doubted = [target, *(self._between(job)[1:] if job.kind == "commit" else [])]
            live = self.live()
            job.doubted += [image for image in self.images.values() if image.name not in live and target in self.under(image)[1:]]
            for image in job.doubted:
                image.doubts += 1

    def _between(self, job):
        """The images that a commit goes over, its top first."""
        source, target = self.resolve(job.source), self.resolve(job.target)
        return [image for image in self.under(source) if image not in self.under(target)]

    def refused(self, job):
        """There is no such job."""
        if self.jobs.get(job.name) is job:
            del self.jobs[job.name]
        self._decide(job)

    def _decide(self, job, unknown=()):
        """It changes its images no more. What it leaves behind in some isn't known."""
        for image in job.doubted:
            image.doubts -= 1
        for image in unknown:
            image.disk = Disk.unknown(image.disk.units)
            image.fresh = False
        job.doubted = []

    def failed(self, job):
        """It has ended before it was done."""
        self._decide(job, job.doubted)

    def started(self, job):
        """It has begun at some moment until now."""
        source = self.resolve(job.source)
        if job.kind == "backup" and source and not source.doubts:
            job.captured = source.disk.frozen(job.sent, self.clock())

    def completed(self, job):
        """It has done all that it was there for."""
        now = self.clock()
        self._decide(job, job.doubted)
        source, target = self.resolve(job.source), self.resolve(job.target) if job.target else None
        if job.kind == "backup" and target and job.whole:
            target.disk = job.captured or Disk.unknown(target.disk.units)
        elif job.kind == "stream" and source:
            layer = self.layer(job.source)
            layer.backing = job.target
            source.below = source.header = target.name if target else None
        elif job.kind == "commit" and not job.active and source and target:
            over = [self.nodes[name] for name in self.chain(job.device) if self.nodes[name].backing == job.source]
            between = self._between(job)
            target.disk = Disk.unknown(target.disk.units) if source.doubts else source.disk.frozen(now, now)
            for node in over:
                node.backing = job.target
                if node.image:
                    node.image.below = node.image.header = target.name
            for image in between:
                image.disk = Disk.unknown(image.disk.units)
        elif job.kind in ("mirror", "commit") and source and target:
            self._followed(job, source, target, now)

    def _followed(self, job, source, target, now):
        since = job.ending if job.ending is not None else job.sent
        pivoted = "complete" in job.asked
        between = self._between(job) if job.kind == "commit" else []
        if pivoted:
            self.relink(job.source, job.target)
            self.move(source, target, since, now)
        else:
            target.disk = source.disk.frozen(since, now)
        if not job.whole:
            target.disk = Disk.unknown(target.disk.units)
        for image in between:
            # Their data are above a base that others write to from now on.
            if image is not source or pivoted:
                image.disk = Disk.unknown(image.disk.units)
