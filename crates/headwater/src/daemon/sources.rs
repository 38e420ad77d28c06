//! Nodes that are reached over a network, from options.

use super::failure::{Refusal, cannot_open, errno_text, generic};
use super::graph::Settings;
use super::graph::holds;
use super::graph::open::{Built, Options, Read};
use super::object_sources;
use super::objects::Objects;
use headwater_block::ErrorKind;
use headwater_nbd::{IpFamily, NbdAddress, NbdUri};
use headwater_storage::http::{HttpNode, HttpOptions};
use headwater_storage::nbd::{NbdNode, NbdOptions, Server};
use headwater_storage::object::ObjectLocation;
use headwater_tls::Endpoint;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

/// How long storage itself tries a request again where somebody above waits.
const SHORT_RETRY: Duration = Duration::from_secs(2);

/// Opens an export of an NBD server.
///
/// # Errors
/// If it can't be reached, or an option isn't supported.
pub(super) async fn open_nbd(objects: &Objects, settings: &mut Settings) -> Result<Built, Refusal> {
    let options = settings.options.clone();
    if options.contains_key("x-dirty-bitmap") {
        return Err(generic("Option 'x-dirty-bitmap' is not supported"));
    }
    let address = options.object("server").ok_or_else(|| generic("NBD server address missing"))?;
    let (server, shown) = server(address)?;
    let export = options.text("export").unwrap_or_default();
    let reconnect = options.number("reconnect-delay").unwrap_or(0);
    let tls = match options.text("tls-creds") {
        Some(id) => Some(objects.credentials(id, Endpoint::Client)?),
        None => None,
    };
    let nbd = NbdOptions {
        read_only: settings.read_only,
        retry: Duration::from_secs(reconnect),
        repeat_changes: reconnect > 0,
        open_timeout: Duration::from_secs(options.number("open-timeout").unwrap_or(0)),
        tls,
        tls_hostname: options.text("tls-hostname").map(str::to_owned),
        ..NbdOptions::default()
    };
    let filename = if export.is_empty() { shown } else { with_export(&shown, export) };
    let opened = objects.ending().guard(NbdNode::open(server, export, nbd)).await;
    let node = opened.and_then(|opened| opened).map_err(|err| match (err.os_code(), err.kind()) {
        (Some(code), _) => {
            generic(format!("Failed to connect to '{}': {}", plain(address), errno_text(code)))
        }
        (None, ErrorKind::NotFound) => {
            tracing::debug!("{err}");
            generic("Requested export not available")
        }
        _ => cannot_open(&filename, &err),
    })?;
    if headwater_block::Node::is_read_only(&*node) && !settings.read_only {
        if !settings.auto_read_only {
            return Err(generic(
                "request on write denied without write permission: the server exports it read-only",
            ));
        }
        settings.read_only = true;
    }
    Ok(Built::new(node, Vec::new(), filename))
}

/// A server's address as messages have it.
fn plain(address: &Options) -> String {
    match (address.text("path"), address.text("host"), address.text("port")) {
        (Some(path), ..) => path.to_owned(),
        (None, Some(host), Some(port)) => format!("{host}:{port}"),
        _ => address.text("str").unwrap_or_default().to_owned(),
    }
}

fn with_export(address: &str, export: &str) -> String {
    match address.split_once('?') {
        Some((start, rest)) => format!("{start}{export}?{rest}"),
        None => format!("{address}/{export}"),
    }
}

/// The address of a server as QMP writes it, and how people write it.
fn server(address: &Options) -> Result<(Server, String), Refusal> {
    let text = |key: &str| address.text(key).unwrap_or_default();
    match text("type") {
        "unix" if address.flag("abstract").unwrap_or(false) => {
            let tight = address.flag("tight").unwrap_or(true);
            Ok((
                Server::Abstract { name: text("path").into(), tight },
                format!("nbd+unix:///?socket=@{}", text("path")),
            ))
        }
        "unix" => Ok((
            Server::Unix { path: PathBuf::from(text("path")) },
            format!("nbd+unix:///?socket={}", text("path")),
        )),
        "inet" => {
            let port = port(text("port"))?;
            let host = text("host").to_owned();
            let shown = format!("nbd://{host}:{port}");
            Ok((Server::Inet { host, port, family: family(address)? }, shown))
        }
        "fd" => Ok((Server::Fd(descriptor(text("str"))?), format!("nbd+fd:{}", text("str")))),
        other => Err(generic(format!("Sockets of type '{other}' are not supported"))),
    }
}

/// Which addresses of a host count.
///
/// # Errors
/// If none do.
pub(super) fn family(address: &Options) -> Result<IpFamily, Refusal> {
    match (address.flag("ipv4"), address.flag("ipv6")) {
        (Some(false), Some(false)) => Err(generic("Cannot disable IPv4 and IPv6 at same time")),
        (Some(true), Some(true)) | (None, None) => Ok(IpFamily::Any),
        (Some(true), _) | (_, Some(false)) => Ok(IpFamily::V4),
        (_, Some(true)) | (Some(false), _) => Ok(IpFamily::V6),
    }
}

/// A port by number; names of services are looked up for those that have one.
///
/// # Errors
/// If it isn't one.
pub(super) fn port(text: &str) -> Result<u16, Refusal> {
    match text {
        "nbd" => Ok(10809),
        _ => text.parse().map_err(|_| generic(format!("'{text}' is not a port number"))),
    }
}

/// A descriptor that this process was started with.
///
/// # Errors
/// If there is none of that number.
pub(super) fn descriptor(text: &str) -> Result<OwnedFd, Refusal> {
    let number: i32 =
        text.parse().map_err(|_| generic(format!("'{text}' is not the number of a file descriptor")))?;
    crate::inherited::descriptor(number)
        .map_err(|err| generic(format!("There is no file descriptor {number}: {err}")))
}

/// Opens an object behind an HTTP server.
///
/// # Errors
/// If it can't be reached, or an option isn't supported.
pub(super) async fn open_http(objects: &Objects, settings: &mut Settings) -> Result<Built, Refusal> {
    let options = settings.options.clone();
    for unsupported in
        ["username", "password-secret", "proxy-username", "proxy-password-secret", "cookie", "cookie-secret"]
    {
        if options.contains_key(unsupported) {
            return Err(generic(format!("Option '{unsupported}' is not supported")));
        }
    }
    if options.flag("sslverify") == Some(false) {
        return Err(generic("Option 'sslverify=off' is not supported: certificates are always checked"));
    }
    if !settings.read_only && !settings.auto_read_only {
        return Err(generic("curl block device does not support writes"));
    }
    settings.read_only = true;
    let url = options.text("url").unwrap_or_default();
    let mut http = HttpOptions::default();
    if holds::own(&options)?.unwrap_or(objects.patience()).lasts(Duration::ZERO) {
        // Those above wait.
        http.retry = SHORT_RETRY;
    }
    if let Some(timeout) = options.number("timeout") {
        http.request_timeout = Duration::from_secs(timeout);
    }
    let node = HttpNode::open(url, http).await.map_err(|err| cannot_open(url, &err))?;
    Ok(Built::new(node, Vec::new(), url.to_owned()))
}

/// The options that open what a URI leads to.
///
/// # Errors
/// If nothing here can.
pub(super) fn uri_options(uri: &str) -> Result<Options, Refusal> {
    let scheme = uri.split("://").next().unwrap_or_default();
    let options = match scheme {
        "http" | "https" => json!({"driver": scheme, "url": uri}),
        "null-co" | "null-aio" => json!({"driver": scheme}),
        _ if ObjectLocation::is_object(uri) => object_sources::uri_options(uri)?,
        _ if NbdUri::is_nbd(uri) => {
            let parsed: NbdUri = uri.parse().map_err(|err| generic(format!("{uri}: {err}")))?;
            let server = match &parsed.address {
                NbdAddress::Tcp { host, port } => {
                    json!({"type": "inet", "host": host, "port": port.to_string()})
                }
                NbdAddress::Unix { path } => json!({"type": "unix", "path": path.to_string_lossy()}),
            };
            json!({"driver": "nbd", "server": server, "export": parsed.export})
        }
        _ => return Err(generic(format!("Unknown protocol '{scheme}'"))),
    };
    match options {
        Value::Object(options) => Ok(options),
        _ => Err(generic("no options")),
    }
}
