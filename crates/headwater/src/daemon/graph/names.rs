//! What nodes are called by those who look at images from outside: in answers, and in the headers of images on top.
//!
//! As in QEMU the name is a plain one, a file's or an address, if opening that would bring about the same nodes: if the options of the image say nothing that changes
//! what is read, and its backing is the one that its header names. Otherwise it is `json:` and the options that do bring them about. Filters that are no
//! format have such a name as a rule. What messages call a node is simpler: [`GraphNode::filename`].
//!
//! In headers it is the bytes that count: filters, which don't change them, are left out of names there. Who opens the image another time may have no throttle
//! group, and QEMU can't open all names of that kind that it makes up.

use super::{Graph, GraphNode, Role};
use crate::daemon::graph::open::{Options, Read};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

/// The longest name, in bytes; a longer one ends in dots.
const LONGEST: usize = 4095;

/// How the options of a node are told, one after the other; all others come before the last two, in the order of their letters.
const ORDER: [&str; 20] = [
    "throttle-group",
    "backing",
    "read-zeroes",
    "offset",
    "opt-write-zero",
    "test",
    "data-file",
    "max-write-zero",
    "image",
    "max-transfer",
    "driver",
    "size",
    "raw",
    "config",
    "opt-discard",
    "max-discard",
    "align",
    "target",
    "file",
    "filename",
];

/// The names of one node.
struct Name {
    /// Opens the node as it is, if there is such a name.
    exact: Option<String>,
    /// Its options as JSON.
    options: String,
    /// The one that is told.
    told: String,
}

/// The names of nodes at one moment: each is found once.
pub(in crate::daemon) struct Names<'a> {
    graph: &'a Graph,
    for_headers: bool,
    known: RefCell<HashMap<*const GraphNode, Rc<Name>>>,
}

impl Graph {
    /// The names of nodes, as they are now.
    pub(in crate::daemon) fn names(&self) -> Names<'_> {
        Names { graph: self, for_headers: false, known: RefCell::default() }
    }

    /// The same for headers of images.
    pub(in crate::daemon) fn names_for_headers(&self) -> Names<'_> {
        Names { graph: self, for_headers: true, known: RefCell::default() }
    }
}

impl Names<'_> {
    /// What `node` is called.
    pub(in crate::daemon) fn told(&self, node: &Rc<GraphNode>) -> String {
        self.of(node).told.clone()
    }

    /// The image in the chain under `top` that the name `name` of a backing file means, as the header above it spells it or as a path that leads to the same file.
    pub(in crate::daemon) fn find_backing(&self, top: &Rc<GraphNode>, name: &str) -> Option<Rc<GraphNode>> {
        let mut over = top.skip_filters();
        while let Some(below) = over.child(Role::Backing) {
            let below = below.skip_filters();
            let named = |names: &Self| {
                names.told(&below) == name || !names.is_overridden(&over) && names_in_header(&over, name)
            };
            if named(self) || named(&self.graph.names_for_headers()) {
                return Some(below);
            }
            over = below;
        }
        None
    }

    fn of(&self, node: &Rc<GraphNode>) -> Rc<Name> {
        let key = Rc::as_ptr(node);
        if let Some(known) = self.known.borrow().get(&key) {
            return known.clone();
        }
        let name = Rc::new(self.find(node));
        self.known.borrow_mut().insert(key, name.clone());
        name
    }

    /// The name of what a link leads to: that of the node that stands for a job there, if a user has named it.
    fn through_link(&self, node: &Rc<GraphNode>) -> Rc<Name> {
        match self.graph.shadow_on(node) {
            _ if self.for_headers => self.of(&node.skip_filters()),
            Some(shadow) if !shadow.name.starts_with('#') => self.of(&shadow),
            _ => self.of(node),
        }
    }

    fn find(&self, node: &Rc<GraphNode>) -> Name {
        if let Some(on) = node.child(Role::Shadow) {
            return self.of_shadow(node, &on);
        }
        let options = node.settings.borrow().options.clone();
        let own = own_options(node.driver, &options);
        let overridden = self.is_overridden(node);
        let links: Vec<_> =
            node.links.borrow().iter().map(|link| (link.name, link.role, link.to.clone())).collect();
        let mut told = own.clone();
        let mut children = Vec::new();
        for (name, role, to) in &links {
            let child = self.through_link(to);
            let to = if self.for_headers { to.skip_filters() } else { to.clone() };
            if *name != "backing" || overridden {
                told.push(((*name).to_owned(), child.options.clone()));
            }
            children.push((*role, to.driver, child));
        }
        if overridden && !links.iter().any(|(name, ..)| *name == "backing") {
            told.push(("backing".to_owned(), "null".to_owned()));
        }
        let exact = match node.driver {
            "raw" | "qcow2" => {
                let file = children.iter().find(|(role, ..)| *role == Role::File);
                file.filter(|(_, driver, _)| {
                    (is_protocol(driver) || self.for_headers && *driver == "replicas")
                        && own.is_empty()
                        && !overridden
                })
                .and_then(|(_, _, file)| file.exact.clone())
            }
            "replicas" | "verify" if self.for_headers => Some(node.filename()),
            "throttle" | "copy-on-read" | "compress" | "replicas" | "verify" => None,
            // They show the child's bytes, or what those were.
            "copy-before-write" | "snapshot-access" => children.first().map(|(.., child)| child.told.clone()),
            "blkdebug" => {
                let plain = own.iter().all(|(key, _)| key == "config");
                let config = options.text("config").unwrap_or_default();
                let exact = children.first().and_then(|(.., child)| child.exact.clone());
                exact.filter(|_| plain).map(|exact| format!("blkdebug:{config}:{exact}"))
            }
            "blkverify" => {
                let of = |wanted| children.iter().find(|(role, ..)| *role == wanted);
                let exact = |wanted| of(wanted).and_then(|(.., child)| child.exact.clone());
                let both = exact(Role::Compared).zip(exact(Role::Filtered));
                both.map(|(raw, test)| format!("blkverify:{raw}:{test}"))
            }
            _ => own_name(node, &options),
        };
        Name::new(exact, told, node.driver)
    }

    /// A node that stands for a job is called as what it is on; and if no user has named it, it isn't there.
    fn of_shadow(&self, node: &GraphNode, on: &Rc<GraphNode>) -> Name {
        let below = self.of(on);
        if node.name.starts_with('#') {
            return Name {
                exact: below.exact.clone(),
                options: below.options.clone(),
                told: below.told.clone(),
            };
        }
        let (link, exact) = match node.driver {
            "copy-on-read" => ("file", None),
            "copy-before-write" => ("file", Some(below.told.clone())),
            _ => ("backing", Some(below.told.clone())),
        };
        Name::new(exact, vec![(link.to_owned(), below.options.clone())], node.driver)
    }

    /// True if the backing of `over` isn't what its header names.
    fn is_overridden(&self, over: &GraphNode) -> bool {
        let inside = over.inside.borrow();
        let named = inside.image.as_ref().and_then(|image| image.header().backing_name.clone());
        let backing = over.child(Role::Backing).or_else(|| over.child(Role::Moment));
        match (named, backing) {
            (named, None) => named.is_some(),
            (None, Some(_)) => true,
            (Some(named), Some(backing)) => {
                let told = self.through_link(&backing);
                let named = inside.followed.as_ref().unwrap_or(&named);
                *named != told.told && full_name(over, named).is_none_or(|full| full != told.told)
            }
        }
    }
}

impl Name {
    fn new(exact: Option<String>, mut options: Vec<(String, String)>, driver: &str) -> Self {
        options.push(("driver".to_owned(), Value::from(driver).to_string()));
        let place = |key: &str| ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len() - 3);
        options.sort_by(|(one, _), (other, _)| (place(one), one).cmp(&(place(other), other)));
        let list: Vec<_> =
            options.iter().map(|(key, value)| format!("{}: {value}", Value::from(key.as_str()))).collect();
        let mut options = format!("{{{}}}", list.join(", "));
        let told = exact.clone().unwrap_or_else(|| shorten(format!("json:{options}")));
        // Nobody is told more of it, and nodes may be nested so that there is no end of it.
        cut(&mut options, LONGEST);
        Self { exact, options, told }
    }
}

fn shorten(mut name: String) -> String {
    if name.len() > LONGEST {
        cut(&mut name, LONGEST - 3);
        name += "...";
    }
    name
}

/// Makes `text` at most `len` bytes long.
fn cut(text: &mut String, len: usize) {
    let end = (0..=len.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
}

/// True for drivers that reach bytes by themselves, and blkdebug and blkverify, which are called like them.
fn is_protocol(driver: &str) -> bool {
    !matches!(
        driver,
        "raw"
            | "qcow2"
            | "throttle"
            | "copy-on-read"
            | "compress"
            | "copy-before-write"
            | "snapshot-access"
            | "replicas"
            | "verify"
    )
}

/// The options of a node that decide what is read there, those of nested objects by their paths, without those of children.
fn own_options(driver: &str, options: &Options) -> Vec<(String, String)> {
    let keys: &[&str] = match driver {
        "file" | "host_device" => &["filename"],
        "raw" => &["offset", "size"],
        "null-co" | "null-aio" => &["size", "read-zeroes"],
        "throttle" => &["throttle-group"],
        "verify" => &["manifest"],
        "blkdebug" => &[
            "config",
            "inject-error",
            "set-state",
            "align",
            "max-transfer",
            "opt-write-zero",
            "max-write-zero",
            "opt-discard",
            "max-discard",
        ],
        "nbd" => &["server", "export", "tls-creds", "tls-hostname"],
        "http" | "https" => &[
            "url",
            "sslverify",
            "cookie",
            "cookie-secret",
            "username",
            "password-secret",
            "proxy-username",
            "proxy-password-secret",
        ],
        "s3" | "gs" | "az" => {
            &["bucket", "container", "key", "account", "endpoint", "region", "version-id", "anonymous"]
        }
        _ => &[],
    };
    let mut list = Vec::new();
    for key in keys {
        if let Some(value) = options.get(*key) {
            flatten((*key).to_owned(), value, &mut list);
        }
    }
    list
}

fn flatten(path: String, value: &Value, list: &mut Vec<(String, String)>) {
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(key, value)| flatten(format!("{path}.{key}"), value, list));
        }
        Value::Array(items) => {
            (0..).zip(items).for_each(|(at, value): (usize, _)| flatten(format!("{path}.{at}"), value, list));
        }
        plain => list.push((path, plain.to_string())),
    }
}

/// The name of a node that reaches bytes by itself, if its other options don't matter.
fn own_name(node: &GraphNode, options: &Options) -> Option<String> {
    let has = |keys: &[&str]| keys.iter().any(|key| options.contains_key(*key));
    let more = match node.driver {
        "null-co" | "null-aio" => has(&["size", "read-zeroes"]),
        "http" | "https" => {
            options.flag("sslverify") == Some(false)
                || has(&[
                    "cookie",
                    "cookie-secret",
                    "username",
                    "password-secret",
                    "proxy-username",
                    "proxy-password-secret",
                ])
        }
        "nbd" => options.object("server").is_some_and(|server| {
            let kind = server.text("type");
            !matches!(kind, Some("inet" | "unix"))
                || ["ipv4", "ipv6", "to"].iter().any(|key| server.contains_key(*key))
        }),
        _ => false,
    };
    (!more).then(|| node.own_filename.clone())
}

/// True if `name` has something that looks like a protocol: a colon, before any slash.
pub(in crate::daemon) fn has_protocol(name: &str) -> bool {
    name.find([':', '/']).is_some_and(|at| name.as_bytes()[at] == b':')
}

/// What the header of `over` means by the name `name`: a relative one starts from the image's directory. None if there is no such directory.
pub(super) fn full_name(over: &GraphNode, name: &str) -> Option<String> {
    if name.starts_with('/') || has_protocol(name) {
        return Some(name.to_owned());
    }
    let holder = over.filename();
    if has_protocol(&holder) {
        return None;
    }
    let directory = Path::new(&holder).parent().unwrap_or(Path::new(""));
    Some(directory.join(name).to_string_lossy().into_owned())
}

/// True if the header of `over` calls its backing `name`, or a path that leads to the same file.
fn names_in_header(over: &GraphNode, name: &str) -> bool {
    let image = over.inside.borrow().image.clone();
    let Some(header) = image.and_then(|image| image.header().backing_name.clone()) else { return false };
    if has_protocol(name) || has_protocol(&header) {
        return name == header || full_name(over, &header).is_some_and(|full| full == name);
    }
    let real = |name: &str| full_name(over, name).and_then(|full| std::fs::canonicalize(full).ok());
    matches!((real(name), real(&header)), (Some(one), Some(other)) if one == other)
}
