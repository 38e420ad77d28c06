//! Rights: what each user of a node does to it, and what it bears that others do.
//!
//! As in QEMU each link and each root names the two sets. A node's users agree if nothing that one of them does is something that another
//! doesn't bear. What a filter does to the node below it is what its own users do; an image holds its file for itself; and a backing
//! is only read, by everyone, as long as it is one: that is stricter than QEMU, which lets a user that shares everything
//! write to it, and is what lets copies of its bytes be true (see `headwater_block::copy_up`).
//!
//! The locks on files follow: they tell other processes what the users of the file's node do together.

use super::{Graph, GraphNode, Link, Role, used_by};
use crate::daemon::failure::{Refusal, generic};
use headwater_storage::file::Use;
use std::rc::Rc;
use std::time::Duration;

/// A set of things that can be done to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) struct Doing(u8);

impl Doing {
    pub(in crate::daemon) const NOTHING: Self = Self(0);
    /// Reading what must be right.
    pub(in crate::daemon) const READ: Self = Self(1);
    /// Writing.
    pub(in crate::daemon) const WRITE: Self = Self(2);
    /// Writing what nobody sees: where the bytes are changes, not what they are.
    pub(in crate::daemon) const REARRANGE: Self = Self(4);
    pub(in crate::daemon) const RESIZE: Self = Self(8);
    pub(in crate::daemon) const ALL: Self = Self(15);

    pub(in crate::daemon) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(in crate::daemon) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(in crate::daemon) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    const NAMED: [(Self, &'static str); 4] = [
        (Self::READ, "consistent read"),
        (Self::WRITE, "write"),
        (Self::REARRANGE, "write unchanged"),
        (Self::RESIZE, "resize"),
    ];

    fn names(self) -> String {
        let of = Self::NAMED.iter().filter(|(one, _)| self.has(*one));
        of.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }

    /// What a list of permissions in options stands for; nothing, if there is none.
    fn of_permissions(list: Option<&serde_json::Value>) -> Self {
        let said = list.and_then(serde_json::Value::as_array).into_iter().flatten();
        said.filter_map(serde_json::Value::as_str).fold(Self::NOTHING, |all, name| {
            let one = Self::NAMED.iter().find(|(_, known)| known.replace(' ', "-") == name);
            one.map_or(all, |(one, _)| all.and(*one))
        })
    }
}

/// What a user does to a node, and what it bears of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) struct Rights {
    pub(in crate::daemon) does: Doing,
    pub(in crate::daemon) bears: Doing,
}

impl Rights {
    /// Of an NBD export, which bears everything but another size: its clients keep the one that they were told.
    pub(in crate::daemon) fn of_export(writable: bool) -> Self {
        Self { bears: Doing::ALL.without(Doing::RESIZE), ..Self::of_machine(writable) }
    }

    /// Of an export to a machine, which hears of another size.
    pub(in crate::daemon) fn of_machine(writable: bool) -> Self {
        let does = if writable { Doing::READ.and(Doing::WRITE) } else { Doing::READ };
        Self { does, bears: Doing::ALL }
    }
}

/// A user of a node, for messages.
struct User {
    who: String,
    child: &'static str,
    rights: Rights,
}

impl Graph {
    /// Everybody who uses `node`.
    fn users(&self, node: &Rc<GraphNode>) -> Vec<User> {
        let mut users: Vec<User> = self
            .roots_of(node)
            .iter()
            .map(|root| {
                let mut rights = root.rights.get();
                if root.yields && !node.active.get() {
                    rights.does = rights.does.common(Doing::READ);
                }
                User { who: root.user.clone(), child: root.child, rights }
            })
            .collect();
        for parent in self.parents(node) {
            for link in parent.links.borrow().iter().filter(|link| Rc::ptr_eq(&link.to, node)) {
                users.push(User {
                    who: format!("node '{}'", parent.name),
                    child: link.name,
                    rights: self.rights_of(&parent, link),
                });
            }
        }
        users
    }

    /// What all users of `node` do, and what all of them bear.
    pub(in crate::daemon) fn together(&self, node: &Rc<GraphNode>) -> Rights {
        let none = Rights { does: Doing::NOTHING, bears: Doing::ALL };
        self.users(node).iter().fold(none, |all, user| Rights {
            does: all.does.and(user.rights.does),
            bears: all.bears.common(user.rights.bears),
        })
    }

    /// True if somebody writes to `node`, those left out of whom `but` is true.
    pub(super) fn is_written(&self, node: &Rc<GraphNode>, but: impl Fn(&Rc<GraphNode>) -> bool) -> bool {
        let writes = |rights: Rights| rights.does.has(Doing::WRITE.and(Doing::REARRANGE));
        let by_node = |parent: Rc<GraphNode>| {
            let links = parent.links.borrow();
            links.iter().any(|link| Rc::ptr_eq(&link.to, node) && writes(self.rights_of(&parent, link)))
        };
        self.roots_of(node).iter().any(|root| writes(root.rights.get()))
            || self.parents(node).into_iter().filter(|parent| !but(parent)).any(by_node)
    }

    /// What `parent` does to the node that `link` leads to.
    fn rights_of(&self, parent: &Rc<GraphNode>, link: &Link) -> Rights {
        let settings = parent.settings.borrow();
        match link.role {
            Role::Filtered | Role::Compared => {
                let above = self.together(parent);
                let copies = parent.driver == "copy-on-read" && !settings.read_only;
                let does = if copies { above.does.and(Doing::REARRANGE) } else { above.does };
                // A blkdebug node can be told to be a worse user than those above it.
                let said = |key| Doing::of_permissions(settings.options.get(key));
                Rights {
                    does: does.and(said("take-child-perms")),
                    bears: above.bears.and(Doing::REARRANGE).without(said("unshare-child-perms")),
                }
            }
            Role::Target => {
                Rights { does: Doing::READ.and(Doing::WRITE), bears: Doing::READ.and(Doing::REARRANGE) }
            }
            // Reading is all that is done there.
            Role::Moment => {
                Rights { does: self.together(parent).does.common(Doing::READ), bears: Doing::ALL }
            }
            Role::Shadow => Rights { does: Doing::NOTHING, bears: Doing::ALL },
            // Who isn't used reads nothing.
            Role::Backing if self.together(parent).does == Doing::NOTHING => {
                Rights { does: Doing::NOTHING, bears: Doing::ALL }
            }
            // Others may write what is left to them.
            Role::Backing if !parent.active.get() => Rights { does: Doing::READ, bears: Doing::ALL },
            // A commit goes along here. It reads itself what is below, and what it writes there is hidden by the layers that it comes from.
            Role::Backing if is_committed(parent, &link.to) => {
                Rights { does: Doing::NOTHING, bears: Doing::ALL.without(Doing::RESIZE) }
            }
            Role::Backing => Rights { does: Doing::READ, bears: Doing::READ.and(Doing::REARRANGE) },
            Role::File | Role::DataFile if parent.driver == "raw" => {
                // The bytes of the file are the disk: what is done to one is done to the other.
                let above = self.together(parent);
                Rights { does: above.does, bears: above.bears }
            }
            Role::File | Role::DataFile => {
                let changes = Doing::WRITE.and(Doing::RESIZE);
                let does = if settings.read_only || !parent.active.get() {
                    Doing::READ
                } else {
                    Doing::READ.and(changes)
                };
                let others = settings.force_share || !parent.active.get();
                let bears = if others { Doing::ALL } else { Doing::ALL.without(changes) };
                Rights { does, bears }
            }
        }
    }

    fn check_rights(&self) -> Result<(), Refusal> {
        for node in self.nodes() {
            let users = self.users(&node);
            check_active(&node, &users)?;
            for (at, one) in users.iter().enumerate() {
                for other in users.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, other)| other) {
                    let conflict = one.rights.does.without(other.rights.bears);
                    if conflict != Doing::NOTHING {
                        return Err(generic(format!(
                            "Permission conflict on node '{node}': permissions '{}' are both required by {} (uses node '{node}' as '{}' child) \
                             and unshared by {} (uses node '{node}' as '{}' child).",
                            conflict.names(),
                            one.who,
                            one.child,
                            other.who,
                            other.child,
                            node = node.name,
                        )));
                    }
                }
            }
            let together = self.together(&node);
            if together.does.has(Doing::WRITE.and(Doing::REARRANGE)) && node.is_read_only() {
                return Err(generic(if node.links.borrow().is_empty() {
                    format!("Block node '{}' is read-only", node.name)
                } else {
                    "Block node is read-only".to_owned()
                }));
            }
        }
        Ok(())
    }

    /// Looks whether all users of all nodes agree, and lets the locks of files follow. The caller takes back what led to an error.
    ///
    /// # Errors
    /// A conflict, or a file that another process uses.
    pub(in crate::daemon) async fn settle_rights(&self) -> Result<(), Refusal> {
        self.settle_shares();
        self.settle_holds();
        self.check_rights()?;
        for node in self.nodes() {
            let Some(file) = node.inside.borrow().file.clone() else { continue };
            if node.settings.borrow().options.get("locking").is_some_and(|locking| locking == "off") {
                continue;
            }
            let wanted = self.lock_for(&node);
            let mut attempt = 1;
            while let Err(err) = file.change_locks(wanted) {
                // Weaker locks are never refused.
                if attempt == ATTEMPTS {
                    return Err(locked(&node, wanted, &err));
                }
                attempt += 1;
                tokio::time::sleep(BETWEEN_ATTEMPTS).await;
            }
        }
        Ok(())
    }

    fn lock_for(&self, node: &Rc<GraphNode>) -> Option<Use> {
        let Rights { does, bears } = self.together(node);
        if does.has(Doing::WRITE.and(Doing::RESIZE).and(Doing::REARRANGE)) {
            Some(Use::Write)
        } else if does.has(Doing::READ) {
            Some(if bears.has(Doing::WRITE) { Use::ReadShared } else { Use::Read })
        } else {
            None
        }
    }
}

/// True if a commit works on both nodes: then the link between them is one that it goes along, or has made.
fn is_committed(over: &GraphNode, below: &GraphNode) -> bool {
    let (over, below) = (over.busy.borrow(), below.busy.borrow());
    over.iter().any(|one| one.why == used_by("commit") && below.iter().any(|other| other.job == one.job))
}

/// Refuses what isn't done to an inactive node, and an active one that stands on it.
fn check_active(node: &Rc<GraphNode>, users: &[User]) -> Result<(), Refusal> {
    let links = node.links.borrow();
    if let (true, Some(link)) = (node.active.get(), links.iter().find(|link| !link.to.active.get())) {
        let (child, parent) = (&link.to.name, &node.name);
        return Err(generic(format!(
            "Inactive '{child}' can't be a {} child of active '{parent}'",
            link.name
        )));
    }
    let more =
        users.iter().map(|user| user.rights.does.without(Doing::READ)).find(|more| *more != Doing::NOTHING);
    match more.filter(|_| !node.active.get()) {
        Some(more) => Err(generic(format!("Permission '{}' unavailable on inactive node", more.names()))),
        None => Ok(()),
    }
}

/// A process that was killed keeps its locks for some milliseconds: to start again at once must work.
const ATTEMPTS: u32 = 15;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);

fn locked(node: &GraphNode, wanted: Option<Use>, err: &headwater_block::Error) -> Refusal {
    tracing::debug!(node = node.name, "{err}");
    let quoted = if wanted == Some(Use::Write) { "\"write\"" } else { "shared \"write\"" };
    generic(format!("Failed to get {quoted} lock"))
        .with_hint(format!("Is another process using the image [{name}]?", name = node.filename()))
}
