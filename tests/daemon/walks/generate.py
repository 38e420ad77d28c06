"""Chooses what to do next: mostly what may work, now and then what shouldn't."""

SIZES = (2048, 2048, 2048, 2051, 3072)

# Bytes a second: a job does its first step at once, and the next seconds later.
SLOW = 65536


class Generator:
    """Gives actions one by one, looking at what is there."""

    def __init__(self, random, walk, concurrent, kills=False, traffic=True):
        self.random, self.walk, self.world = random, walk, walk.world
        self.concurrent = concurrent
        self.kills, self.traffic = kills, traffic
        self.number = 0
        self.units = random.choice(SIZES)
        self.ready = []

    def name(self, prefix):
        """A new name."""
        self.number += 1
        return f"{prefix}{self.number}"

    def first(self):
        """The actions that a walk begins with: a chain of images, its nodes, and an export with a client."""
        cluster = self.random.choice((65536, 65536, 4096))
        names = [self.name("i") for _ in range(self.random.choice((1, 2, 3, 3, 4)))]
        nodes, below = [], None
        for at, name in enumerate(names):
            form = "raw" if at == 0 and self.random.random() < 0.3 else "qcow2"
            yield {"do": "image", "name": name, "form": form, "units": self.units, "cluster": cluster, "fill": at == 0, "backing": below}
            below = name
        for at, name in enumerate(names):
            yield from self._add(name, nodes[-1] if nodes else None, top=at == len(names) - 1)
            nodes.append(f"n{name}")
        if self.random.random() < 0.4:
            yield from self._filter(nodes[-1])
        tops = [node.name for node in self.world.nodes.values() if not self.world.parents(node.name) and self.world.resolve(node.name)]
        if tops:
            yield from self._export(self.random.choice(tops), writable=True)

    def next(self):
        """One more action."""
        while not self.ready:
            kinds = [
                (self._snapshot, 6),
                (self._snapshot_sync, 4),
                (self._stream, 8),
                (self._commit, 8),
                (self._mirror, 7),
                (self._backup, 5),
                (self._verb, 22 if self.world.jobs else 0),
                (self._more_images, 5),
                (self._more_filters, 3),
                (self._more_exports, 5),
                (self._fewer_exports, 3),
                (self._traffic, 10),
                (self._del, 4),
                (self._reopen, 5),
                (self._resize, 2),
                (self._group, 2),
                (self._transaction, 4),
                (self._header, 1),
                (self._pause, 6 if self.concurrent else 0),
                (self._look, 4 if self.concurrent else 0),
            ]
            chosen = self.random.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
            self.ready = [action for action in chosen() if action]
        return self.ready.pop(0)

    def qmp(self, command, **args):
        """A command, with Python's names."""
        args = {key.rstrip("_").replace("_", "-"): value for key, value in args.items() if value is not ...}
        wait = not self.concurrent or self.random.random() < 0.6
        return {"do": "qmp", "m": self.random.randrange(2), "command": command, "args": args, "wait": wait}

    def maybe(self, value, chance=0.5):
        """The value, or nothing."""
        return value if self.random.random() < chance else ...

    def any_node(self, tops=False, images=False):
        """The name of a node; None if there is none."""
        names = [
            node.name
            for node in self.world.nodes.values()
            if not node.name.startswith("#") and not (tops and self.world.parents(node.name)) and (not images or node.image) and self.world.resolve(node.name)
        ]
        return self.random.choice(names) if names else None

    # Nodes

    def _add(self, image, backing, top=True):
        """A node for an image, in one of the ways there are."""
        form = self.world.images[image].form
        name = f"n{image}"
        file = {"driver": "file", "filename": image}
        if form == "raw" and self.random.random() < 0.3:
            yield self.qmp("blockdev-add", node_name=name, **file, read_only=self.maybe(True, 0.2 if top else 0.5))
            return
        if self.random.random() < 0.3:
            yield self.qmp("blockdev-add", node_name=f"f{image}", **file)
            file = f"f{image}"
        elif self.random.random() < 0.15:
            file = self._wrapped(file)
        under = {}
        if form == "qcow2":
            header = self.world.images[image].header
            if backing or header is None or self.random.random() < 0.1:
                under = {"backing": backing}
        discard = self.maybe("unmap", 0.4)
        yield self.qmp(
            "blockdev-add", driver=form, node_name=name, file=file, **under, read_only=self.maybe(True, 0.1 if top else 0.5), discard=discard
        )

    def _wrapped(self, file):
        if self.random.random() < 0.5 and self.world.groups:
            return {"driver": "throttle", "throttle-group": sorted(self.world.groups)[0], "file": file}
        return {"driver": "blkdebug", "image": file}

    def _filter(self, node):
        """A filter on a node."""
        name = self.name("l")
        kind = self.random.choice(("throttle", "copy-on-read", "copy-on-read", "blkdebug"))
        if kind == "throttle":
            if not self.world.groups:
                yield from self._group()
            yield self.qmp("blockdev-add", driver=kind, node_name=name, file=node, throttle_group=self.random.choice(sorted(self.world.groups) or ["g0"]))
        elif kind == "blkdebug":
            yield self.qmp("blockdev-add", driver=kind, node_name=name, image=node)
        else:
            yield self.qmp("blockdev-add", driver=kind, node_name=name, file=node, read_only=self.maybe(True, 0.2))

    def _more_images(self):
        name = self.name("i")
        node = self.any_node(images=True)
        below = self.world.resolve(node) if node else None
        overlay = below is not None and self.random.random() < 0.6
        form = "qcow2" if overlay or self.random.random() < 0.8 else "raw"
        units = self.units if self.random.random() < 0.9 else self.random.choice(SIZES)
        cluster = self.random.choice((65536, 4096))
        yield {"do": "image", "name": name, "form": form, "units": units, "cluster": cluster, "backing": below.name if overlay else None}
        if name in self.world.images:
            yield from self._add(name, node if overlay and self.random.random() < 0.7 else None)

    def _more_filters(self):
        node = self.any_node()
        if node:
            yield from self._filter(node)

    def _del(self):
        node = self.any_node(tops=self.random.random() < 0.7)
        if node:
            yield self.qmp("blockdev-del", node_name=node)

    def _group(self):
        names = sorted(self.world.groups)
        limits = {"bps-total": self.random.choice((0, 4 << 20, 64 << 20)), "iops-total": self.random.choice((0, 0, 2000))}
        if not names or self.random.random() < 0.3 and len(names) < 3:
            yield self.qmp("object-add", qom_type="throttle-group", id=f"g{len(names)}", limits=limits)
            return
        name = self.random.choice(names)
        throttles = [node.name for node in self.world.nodes.values() if node.driver == "throttle" and not node.name.startswith("#")]
        if throttles and self.random.random() < 0.5:
            node = self.world.nodes[self.random.choice(throttles)]
            yield self.qmp("blockdev-reopen", options=[{"driver": "throttle", "node-name": node.name, "file": node.child, "throttle-group": name}])
        else:
            yield self.qmp("qom-set", path=f"/objects/{name}", property="limits", value=limits)

    def _reopen(self):
        node = self.any_node(images=True)
        if not node:
            return
        options = [self._as_is(self.world.nodes[node])]
        if options[0] and self.random.random() < 0.3:
            other = self.any_node(images=True)
            options += [self._as_is(self.world.nodes[other])] if other != node else []
        if all(options):
            yield self.qmp("blockdev-reopen", options=options)

    def _as_is(self, node):
        """The options of a node, with something changed that may be."""
        if node.driver not in ("qcow2", "raw", "file") or not node.image:
            return None
        options = {"driver": node.driver, "node-name": node.name}
        if node.driver == "file":
            options["filename"] = node.image.name
        else:
            options["file"] = node.file
        if node.driver == "qcow2":
            if node.backing is None or not node.backing.startswith("#"):
                options["backing"] = node.backing
            # The same content by another way: a filter in between, or what it is on.
            if node.backing and self.random.random() < 0.5:
                below = self.world.layer(node.backing)
                same = [one.name for one in self.world.nodes.values() if self.world.layer(one.name) is below and not one.name.startswith("#")]
                options["backing"] = self.random.choice(same) if same else node.backing
        if self.random.random() < 0.4:
            options["read-only"] = self.random.random() < 0.5
        if self.random.random() < 0.3:
            options["cache"] = {"no-flush": self.random.random() < 0.3}
        if self.random.random() < 0.3:
            options["discard"] = "unmap"
        if self.random.random() < 0.3:
            options["detect-zeroes"] = "on"
        return options

    def _resize(self):
        node = self.any_node()
        if node:
            yield self.qmp("block_resize", node_name=node, size=self.random.choice((self.units, self.units, 1024, 4096, 2051)) * 512)

    def _header(self):
        node = self.any_node(tops=True)
        images = [name for name in self.world.chain(node) if self.world.nodes[name].backing and not name.startswith("#")] if node else []
        if images:
            name = self.random.choice(images)
            below = self.world.resolve(self.world.nodes[name].backing)
            if below:
                yield self.qmp("change-backing-file", device=node, image_node_name=name, backing_file=below.name)

    # Snapshots

    def _overlay(self, node):
        """A new image for an overlay of `node`, and its node, on nothing."""
        name = self.name("i")
        units = self.world.resolve(node).disk.units if self.random.random() < 0.95 else self.units
        cluster = self.random.choice((65536, 4096))
        yield {"do": "image", "name": name, "form": "qcow2", "units": units, "cluster": cluster}
        yield self.qmp("blockdev-add", driver="qcow2", node_name=f"n{name}", file={"driver": "file", "filename": name}, backing=None) | {"wait": True}

    def _snapshot(self):
        node = self.any_node(tops=self.random.random() < 0.9)
        if node:
            yield from self._overlay(node)
            yield self.qmp("blockdev-snapshot", node=node, overlay=f"ni{self.number}")

    def _snapshot_sync(self):
        node = self.any_node(tops=self.random.random() < 0.9)
        if node:
            yield self.qmp("blockdev-snapshot-sync", **self._sync(node))

    def _sync(self, node):
        name = self.name("i")
        return {"node_name": node, "snapshot_file": name, "snapshot_node_name": f"n{name}"}

    def _transaction(self):
        nodes = [self.any_node(tops=True) for _ in range(self.random.choice((1, 2, 2, 3)))]
        actions = []
        for node in filter(None, nodes):
            if self.random.random() < 0.4:
                yield from self._overlay(node)
                actions.append({"type": "blockdev-snapshot", "data": {"node": node, "overlay": f"ni{self.number}"}})
            elif self.random.random() < 0.5:
                data = {key.replace("_", "-"): value for key, value in self._sync(node).items()}
                actions.append({"type": "blockdev-snapshot-sync", "data": data})
            elif target := self.any_node(tops=True):
                actions.append({"type": "blockdev-backup", "data": {"job-id": self.name("j"), "device": node, "target": target, "sync": "full"}})
        if self.random.random() < 0.2:
            actions.append({"type": "abort", "data": {}})
        if actions:
            yield self.qmp("transaction", actions=actions)

    # Jobs

    def _common(self):
        return {
            "job_id": self.name("j") if self.random.random() < 0.97 else "j1",
            "speed": self.maybe(SLOW, 0.35),
            "auto_finalize": self.maybe(False, 0.15),
            "auto_dismiss": self.maybe(False, 0.15),
            "filter_node_name": self.maybe(self.name("t"), 0.2),
        }

    def _stream(self):
        node = self.any_node()
        if not node:
            return
        chain = [name for name in self.world.chain(node)[1:] if not name.startswith("#")]
        end = {}
        if chain and self.random.random() < 0.6:
            end = {self.random.choice(("base_node", "base_node", "bottom")): self.random.choice(chain)}
        yield self.qmp("block-stream", device=node, **end, **self._common())

    def _commit(self):
        device = self.any_node(tops=self.random.random() < 0.9)
        if not device:
            return
        chain = [name for name in self.world.chain(device) if not name.startswith("#")]
        args = {}
        at = self.random.randrange(len(chain))
        if at or self.random.random() < 0.5:
            args["top_node"] = chain[at]
        if self.random.random() < 0.6:
            args["base_node"] = self.random.choice(chain[at + 1 :] or chain)
        yield self.qmp("block-commit", device=device, **args, **self._common())

    def _target(self, source):
        """A node to copy to: a new one mostly. Gives the actions that make it, and its name."""
        if self.random.random() < 0.2:
            return [], self.any_node(tops=True) or source
        name = self.name("i")
        form = self.random.choice(("qcow2", "qcow2", "raw"))
        units = self.world.resolve(source).disk.units if self.random.random() < 0.95 else 512
        made = {"do": "image", "name": name, "form": form, "units": units, "cluster": self.random.choice((65536, 4096))}
        file = {"driver": "file", "filename": name}
        under = {"backing": None} if form == "qcow2" else {}
        add = self.qmp("blockdev-add", driver=form, node_name=f"n{name}", file=file, **under, read_only=self.maybe(True, 0.1))
        return [made, add | {"wait": True}], f"n{name}"

    def _mirror(self):
        source = self.any_node(tops=self.random.random() < 0.9)
        if source:
            actions, target = self._target(source)
            yield from actions
            mode = self.maybe(self.random.choice(("background", "write-blocking")), 0.5)
            granularity = self.maybe(self.random.choice((512, 4096, 65536)), 0.3)
            yield self.qmp("blockdev-mirror", device=source, target=target, sync="full", copy_mode=mode, granularity=granularity, **self._common())

    def _backup(self):
        source = self.any_node(tops=self.random.random() < 0.7)
        if source:
            actions, target = self._target(source)
            yield from actions
            sync = "full" if self.random.random() < 0.85 else self.random.choice(("none", "top"))
            yield self.qmp("blockdev-backup", device=source, target=target, sync=sync, **self._common())

    def _verb(self):
        job = self.random.choice(sorted(self.world.jobs))
        verb = self.random.choice(
            ("pause", "resume", "resume", "set-speed", "set-speed", "cancel", "cancel", "complete", "complete", "complete", "finalize", "finalize", "dismiss")
        )
        if verb == "set-speed":
            yield self.qmp("block-job-set-speed", device=job, speed=self.random.choice((0, 0, SLOW, 1 << 20)))
        elif self.random.random() < 0.5:
            force = {"force": self.random.random() < 0.5} if verb == "cancel" else {}
            if verb in ("finalize", "dismiss"):
                yield self.qmp(f"block-job-{verb}", id=job)
            else:
                yield self.qmp(f"block-job-{verb}", device=job, **force)
        else:
            yield self.qmp(f"job-{verb}", id=job)

    # Clients

    def _export(self, node, writable):
        name = self.name("e")
        yield self.qmp("block-export-add", type="nbd", id=name, node_name=node, name=name, writable=writable) | {"wait": True}
        yield from self._use(name)

    def _use(self, name):
        if not self.traffic:
            return
        if self.concurrent:
            yield {"do": "client", "export": name, "seed": self.random.randrange(1 << 30)}
        else:
            yield {"do": "io", "export": name, "seed": self.random.randrange(1 << 30), "count": self.random.choice((6, 30, 90))}

    def _more_exports(self):
        if len(self.world.exports) < 5:
            node = self.any_node(tops=self.random.random() < 0.6)
            if node:
                yield from self._export(node, writable=self.random.random() < 0.6)

    def _fewer_exports(self):
        if self.world.exports:
            name = self.random.choice(sorted(self.world.exports))
            mode = self.random.choice(("safe", "hard"))
            if mode == "safe" and self.random.random() < 0.7:
                yield {"do": "stop", "export": name}
            yield self.qmp("block-export-del", id=name, mode=mode)

    def _traffic(self):
        if self.world.exports:
            yield from self._use(self.random.choice(sorted(self.world.exports)))

    def _look(self):
        yield {"do": "nodes"}

    def _pause(self):
        yield {"do": "sleep", "ms": self.random.choice((1, 5, 30, 120))}
        if self.kills and self.random.random() < 0.15:
            yield {"do": "kill"}
