//! `~/.aws/credentials` and `~/.aws/config`, as far as they hold keys, a region and an endpoint.
//!
//! Profiles that get their keys elsewhere (a role, single sign-on, a program) are refused with advice.

use headwater_block::{Error, ErrorKind, Result};
use std::collections::HashMap;
use std::env;
use std::path::{Path, PathBuf};

/// What a profile says.
#[derive(Default, PartialEq, Eq)]
pub(super) struct Profile {
    /// The key's id, the key, and the token of a session.
    pub(super) keys: Option<(String, String, Option<String>)>,
    pub(super) region: Option<String>,
    pub(super) endpoint: Option<String>,
}

/// The two files, in this order: credentials, config. None where neither a variable nor a home directory says where.
pub(super) fn paths() -> [Option<PathBuf>; 2] {
    [("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")].map(|(variable, name)| {
        let set = |variable| env::var_os(variable).filter(|value| !value.is_empty());
        set(variable).map(PathBuf::from).or_else(|| Some(PathBuf::from(set("HOME")?).join(".aws").join(name)))
    })
}

/// Reads the profile that is called `asked`; without that, the one that the environment names, or `default`.
///
/// # Errors
/// `NotFound` if there is no such profile although one was named, `Unsupported` if its keys come from elsewhere, and what the system says of
/// files that can't be read.
pub(super) fn read(asked: Option<&str>) -> Result<Profile> {
    let named = asked.map(str::to_owned).or_else(|| {
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        variable("AWS_PROFILE").or_else(|| variable("AWS_DEFAULT_PROFILE"))
    });
    let name = named.as_deref().unwrap_or("default");
    let paths = paths();
    let mut found = HashMap::new();
    let mut sections = 0;
    for (path, in_config) in [(&paths[1], true), (&paths[0], false)] {
        let Some(text) = path.as_deref().map(contents).transpose()?.flatten() else { continue };
        if let Some(section) = section(&text, name, in_config) {
            sections += 1;
            found.extend(section);
        }
    }
    if sections == 0 && named.is_some() {
        let files: Vec<_> = paths.iter().flatten().map(|path| path.display().to_string()).collect();
        let message = format!("there is no profile {name:?} in {}", files.join(" or "));
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    profile(name, found)
}

fn contents(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(Error::from_io(err, format_args!("read {}", path.display()))),
    }
}

/// The settings of a profile's section, if there is one. In the config file its title begins with `profile`, but for `default`.
fn section(text: &str, name: &str, in_config: bool) -> Option<HashMap<String, String>> {
    let mut settings: Option<HashMap<String, String>> = None;
    let mut inside = false;
    for line in text.lines() {
        // Indented lines belong to a setting of several parts, none of which is looked at here.
        if line.starts_with([' ', '\t', '#', ';']) || line.trim().is_empty() {
            continue;
        }
        if let Some(title) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            let title = title.trim();
            let titled = title.strip_prefix("profile ").map(str::trim).filter(|_| in_config);
            inside = titled == Some(name) || (title == name && (!in_config || name == "default"));
            if inside {
                settings.get_or_insert_default();
            }
        } else if let (true, Some((key, value)), Some(settings)) =
            (inside, line.split_once('='), settings.as_mut())
            && !value.trim().is_empty()
        {
            settings.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    settings
}

fn profile(name: &str, mut settings: HashMap<String, String>) -> Result<Profile> {
    let keys = match (settings.remove("aws_access_key_id"), settings.remove("aws_secret_access_key")) {
        (Some(id), Some(secret)) => Some((id, secret, settings.remove("aws_session_token"))),
        (None, None) => None,
        _ => {
            let message =
                format!("profile {name:?} has one of aws_access_key_id and aws_secret_access_key only");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
    };
    let elsewhere = ["role_arn", "credential_process", "sso_session", "sso_start_url"];
    if keys.is_none()
        && let Some(setting) = elsewhere.into_iter().find(|setting| settings.contains_key(*setting))
    {
        let message = format!(
            "profile {name:?} takes its keys from elsewhere ({setting}), which is not supported; put what \
             `aws configure export-credentials --format env` prints into the environment"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(Profile { keys, region: settings.remove("region"), endpoint: settings.remove("endpoint_url") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_in_either_file() {
        let credentials = "# mine\n[default]\naws_access_key_id = A\n\n[ops]\naws_access_key_id=B\naws_secret_access_key = c=d\n";
        let found = section(credentials, "ops", false).unwrap();
        assert_eq!(found["aws_secret_access_key"], "c=d");
        assert!(section(credentials, "other", false).is_none());
        let config = "[profile ops]\nregion = eu-1\ns3 =\n  endpoint_url = http://inner\nendpoint_url = http://outer\n[ops]\nregion=no\n";
        let found = section(config, "ops", true).unwrap();
        assert_eq!((found["region"].as_str(), found["endpoint_url"].as_str()), ("eu-1", "http://outer"));
    }

    #[test]
    fn keys_are_whole_or_their_lack_is_told() {
        let of = |pairs: &[(&str, &str)]| {
            profile("p", pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
        };
        assert!(of(&[("region", "x")]).unwrap().keys.is_none());
        assert!(of(&[("aws_access_key_id", "a"), ("aws_secret_access_key", "b")]).unwrap().keys.is_some());
        let kind = |pairs: &[(&str, &str)]| of(pairs).err().unwrap().kind();
        assert_eq!(kind(&[("aws_access_key_id", "a")]), ErrorKind::InvalidInput);
        assert_eq!(kind(&[("role_arn", "r")]), ErrorKind::Unsupported);
    }
}
