//! Which object: `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `az://CONTAINER/KEY`, and how its store is reached.
//!
//! Nothing secret is part of an address: addresses are written into images, shown in messages and seen in lists of processes.

use headwater_block::{Error, ErrorKind, Result};
use object_store::path::Path;
use std::fmt;
use std::str::FromStr;

/// A kind of object store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Amazon S3, and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
}

impl Service {
    /// The scheme of its addresses, which is also what nodes call themselves.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
        }
    }

    /// The service that an address leads to, or the beginning of one.
    pub fn of_address(uri: &str) -> Option<Self> {
        Self::of_scheme(uri.split_once("://")?.0)
    }

    fn of_scheme(scheme: &str) -> Option<Self> {
        let is = |names: &[&str]| names.iter().any(|name| scheme.eq_ignore_ascii_case(name));
        if is(&["s3", "s3a"]) {
            Some(Self::S3)
        } else if is(&["gs", "gcs"]) {
            Some(Self::Gs)
        } else if is(&["az", "azure", "abfs", "abfss"]) {
            Some(Self::Az)
        } else {
            None
        }
    }
}

/// An object and how its store is reached. What is left open here, the environment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectLocation {
    /// The kind of store.
    pub service: Service,
    /// Its bucket; Azure calls it a container.
    pub bucket: String,
    /// The object's name in the bucket.
    pub key: String,
    /// `http://` or `https://` addresses of the store. If there are several, they lead to the same bucket, and each stands in for those
    /// that fail.
    pub endpoints: Vec<String>,
    /// S3: the region that requests are signed for.
    pub region: Option<String>,
    /// S3: the section of `~/.aws/credentials` and `~/.aws/config` that counts.
    pub profile: Option<String>,
    /// Azure: the storage account.
    pub account: Option<String>,
    /// This version of the object, not the newest one.
    pub version: Option<String>,
    /// Nobody in particular asks: for objects that everybody may read.
    pub anonymous: bool,
}

impl ObjectLocation {
    /// An object of which the environment says how to reach it.
    pub fn new(service: Service, bucket: impl Into<String>, key: impl Into<String>) -> Self {
        Self {
            service,
            bucket: bucket.into(),
            key: key.into(),
            endpoints: Vec::new(),
            region: None,
            profile: None,
            account: None,
            version: None,
            anonymous: false,
        }
    }

    /// True if `name` has the form of such an address.
    pub fn is_object(name: &str) -> bool {
        Service::of_address(name).is_some()
    }

    /// Looks whether it can name an object at all.
    ///
    /// # Errors
    /// `InvalidInput` if it can't.
    pub fn check(&self) -> Result<()> {
        let bad = |why: String| {
            let message = format!("bad address {self}: {why}; expected {}", form(self.service));
            Err(Error::new(ErrorKind::InvalidInput, message))
        };
        if self.bucket.is_empty() {
            return bad("the bucket is missing".into());
        }
        if self.bucket.contains(['@', '/', '?', '#', '%', ' ']) {
            return bad(format!("{:?} is no name of a bucket", self.bucket));
        }
        if self.key.is_empty() {
            return bad("the key is missing".into());
        }
        if let Err(err) = Path::parse(&self.key) {
            return bad(err.to_string());
        }
        for endpoint in &self.endpoints {
            let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
            if host.is_none_or(|host| host.is_empty() || host.contains(['@', '?', '#', ',', ' '])) {
                return bad(format!("{endpoint:?} is no endpoint; write http://HOST:PORT or https://HOST"));
            }
        }
        let allowed = match self.service {
            Service::S3 => self.account.is_none(),
            Service::Gs => self.account.is_none() && self.region.is_none() && self.profile.is_none(),
            Service::Az => self.region.is_none() && self.profile.is_none(),
        };
        if allowed { Ok(()) } else { bad("an option is not for this kind of store".into()) }
    }

    /// One `name=value` behind the question mark.
    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let value = || {
            if value.is_empty() { Err(format!("{name} has no value")) } else { Ok(value.to_owned()) }
        };
        match name {
            "endpoint" => self.endpoints.extend(value()?.split(',').map(str::to_owned)),
            "region" => self.region = Some(value()?),
            "profile" => self.profile = Some(value()?),
            "account" => self.account = Some(value()?),
            "version-id" => self.version = Some(value()?),
            "anonymous" => self.anonymous = true,
            _ => {
                return Err(format!(
                    "there is no option {name:?}; options are endpoint, region, profile, account, version-id and anonymous (credentials \
                     come from the environment, never from an address)"
                ));
            }
        }
        Ok(())
    }
}

fn form(service: Service) -> &'static str {
    match service {
        Service::S3 => "s3://BUCKET/KEY[?endpoint=URL[,URL...]&region=REGION&profile=NAME]",
        Service::Gs => "gs://BUCKET/KEY",
        Service::Az => "az://CONTAINER/KEY[?account=NAME]",
    }
}

impl FromStr for ObjectLocation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let Some(service) = Service::of_scheme(scheme) else {
            let message = format!("{scheme}:// is no object store; supported are s3://, gs:// and az://");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        };
        let (path, options) = rest.split_once('?').unwrap_or((rest, ""));
        // Options may hold what was meant to be secret.
        let bad = |why: String| {
            let message = format!("bad address {scheme}://{path}: {why}; expected {}", form(service));
            Error::new(ErrorKind::InvalidInput, message)
        };
        let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
        let key = Path::from_url_path(key).map_err(|err| bad(err.to_string()))?;
        let mut location = Self::new(service, bucket, key.as_ref());
        if service == Service::Az
            && let Some((container, host)) = bucket.split_once('@')
        {
            // abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/KEY
            location.account = host.split('.').next().map(str::to_owned);
            location.bucket = container.to_owned();
        } else if bucket.contains('@') {
            let why = "credentials come from the environment, never from an address";
            return Err(Error::new(ErrorKind::InvalidInput, format!("bad address {scheme}://...: {why}")));
        }
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            location.set(name, value).map_err(bad)?;
        }
        location.check()?;
        Ok(location)
    }
}

impl fmt::Display for ObjectLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key.replace('%', "%25").replace('?', "%3F").replace('#', "%23");
        write!(f, "{}://{}/{key}", self.service.scheme(), self.bucket)?;
        let endpoints = (!self.endpoints.is_empty()).then(|| self.endpoints.join(","));
        let options = [
            ("endpoint", &endpoints),
            ("region", &self.region),
            ("profile", &self.profile),
            ("account", &self.account),
            ("version-id", &self.version),
        ];
        let mut before = '?';
        for (name, value) in options {
            if let Some(value) = value {
                write!(f, "{before}{name}={value}")?;
                before = '&';
            }
        }
        if self.anonymous {
            write!(f, "{before}anonymous")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_put_together() {
        let all = "s3://images/a/b%3Fc.qcow2?endpoint=http://a:3900,https://b&region=eu-1&profile=ops&version-id=7&anonymous";
        let location: ObjectLocation = all.parse().unwrap();
        assert_eq!((location.bucket.as_str(), location.key.as_str()), ("images", "a/b?c.qcow2"));
        assert_eq!(location.endpoints, ["http://a:3900", "https://b"]);
        assert!(location.anonymous);
        assert_eq!(location.to_string(), all);
        let lake: ObjectLocation = "abfss://disks@store.dfs.core.windows.net/x.raw".parse().unwrap();
        assert_eq!(lake.to_string(), "az://disks/x.raw?account=store");
        assert_eq!("gcs://b/k".parse::<ObjectLocation>().unwrap().to_string(), "gs://b/k");
        assert!(ObjectLocation::is_object("S3://b/k") && !ObjectLocation::is_object("http://b/k"));
    }

    #[test]
    fn what_names_no_object_is_refused_and_nothing_secret_repeated() {
        for bad in [
            "s3://",
            "s3://bucket",
            "s3://bucket/",
            "s3:///key",
            "s3://b/k?endpoint=ftp://x",
            "s3://b/k?endpoint=http://u:secret@x",
            "s3://b/k?region=",
            "s3://b/k?secret-access-key=hidden",
            "s3://me:hidden@b/k",
            "gs://b/k?profile=x",
            "az://c/k?region=x",
            "ftp://b/k",
        ] {
            let err = bad.parse::<ObjectLocation>().unwrap_err();
            assert_eq!(err.kind(), ErrorKind::InvalidInput, "{bad}");
            assert!(!err.to_string().contains("hidden"), "{err}");
        }
    }
}
