//! TLS credentials as objects: `tls-creds-x509` and `tls-creds-psk`.

use super::super::failure::{Refusal, generic, of_error};
use super::super::graph::open::{Options, Read as _};
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};
use std::path::PathBuf;

/// The file of keys in the directory of the credentials.
const KEYS: &str = "keys.psk";

/// Whose key a client uses if nobody says.
const DEFAULT_USER: &str = "qemu";

/// Certificates.
///
/// # Errors
/// Properties that are missing or can't be honoured, and those of [`TlsCredentials::load`].
pub(super) fn x509(options: &Options) -> Result<TlsCredentials, Refusal> {
    let (endpoint, directory) = common(options)?;
    let verify_peer = options.flag("verify-peer").unwrap_or(true);
    load(&TlsOptions::X509 { endpoint, directory, verify_peer })
}

/// Keys that both sides have. `verify-peer` has no meaning: who has no key is nobody.
///
/// # Errors
/// As for [`x509`].
pub(super) fn psk(options: &Options) -> Result<TlsCredentials, Refusal> {
    let (endpoint, directory) = common(options)?;
    let keys = directory.join(KEYS);
    let user = options.text("username");
    load(&match (endpoint, user) {
        (Endpoint::Server, Some(_)) => {
            return Err(generic("username should not be set when endpoint=server"));
        }
        (Endpoint::Server, None) => TlsOptions::PskServer { keys },
        (Endpoint::Client, user) => {
            TlsOptions::PskClient { keys, user: user.unwrap_or(DEFAULT_USER).to_owned() }
        }
    })
}

fn common(options: &Options) -> Result<(Endpoint, PathBuf), Refusal> {
    let endpoint = match options.text("endpoint") {
        Some("server") => Endpoint::Server,
        _ => Endpoint::Client,
    };
    // Words of GnuTLS. Whoever forbids something by them must not believe that it is forbidden.
    if let Some(priority) = options.text("priority").filter(|priority| *priority != "NORMAL") {
        return Err(generic(format!(
            "Property 'priority' is not supported with the value '{priority}': it is in the words of GnuTLS, which is not used here; \
             leave it out, or say NORMAL"
        )));
    }
    let directory = options.text("dir").ok_or_else(|| generic("Missing 'dir' property value"))?;
    Ok((endpoint, PathBuf::from(directory)))
}

fn load(options: &TlsOptions) -> Result<TlsCredentials, Refusal> {
    TlsCredentials::load(options).map_err(|err| of_error(&err))
}
