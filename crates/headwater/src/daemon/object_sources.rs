//! Nodes over objects in S3, Google Cloud Storage and Azure, from options.
//!
//! Keys come from `secret` objects or from the environment; neither is told to anybody.

use super::failure::{Refusal, cannot_open, generic, of_error};
use super::graph::Settings;
use super::graph::open::{Built, Options, Read};
use super::objects::Objects;
use headwater_storage::http::HttpOptions;
use headwater_storage::object::{self, Keys, ObjectLocation, Service};
use serde_json::{Value, json};
use std::time::Duration;

/// The service behind a driver of ours.
pub(super) fn service(driver: &str) -> Option<Service> {
    [Service::S3, Service::Gs, Service::Az].into_iter().find(|service| service.scheme() == driver)
}

/// Opens an object.
///
/// # Errors
/// If it can't be reached, its options contradict each other, or a secret isn't there.
pub(super) async fn open(
    objects: &Objects,
    service: Service,
    settings: &mut Settings,
) -> Result<Built, Refusal> {
    if !settings.read_only && !settings.auto_read_only {
        return Err(generic("Objects in a store can only be read; add read-only=on"));
    }
    settings.read_only = true;
    let options = &settings.options;
    let location = location(service, options);
    location.check().map_err(|err| of_error(&err))?;
    let keys = keys(objects, service, options)?;
    let mut http = HttpOptions::default();
    if let Some(timeout) = options.number("timeout") {
        http.request_timeout = Duration::from_secs(timeout);
    }
    let filename = location.to_string();
    let node = object::open(&location, &keys, http).await.map_err(|err| cannot_open(&filename, &err))?;
    Ok(Built::new(node, Vec::new(), filename))
}

fn location(service: Service, options: &Options) -> ObjectLocation {
    let bucket = if service == Service::Az { "container" } else { "bucket" };
    let text = |key| options.text(key).map(str::to_owned);
    let endpoints = options.get("endpoint").and_then(Value::as_array).into_iter().flatten();
    ObjectLocation {
        endpoints: endpoints.filter_map(Value::as_str).map(str::to_owned).collect(),
        region: text("region"),
        profile: text("profile"),
        account: text("account"),
        version: text("version-id"),
        anonymous: options.flag("anonymous").unwrap_or(false),
        ..ObjectLocation::new(
            service,
            options.text(bucket).unwrap_or_default(),
            options.text("key").unwrap_or_default(),
        )
    }
}

fn keys(objects: &Objects, service: Service, options: &Options) -> Result<Keys, Refusal> {
    let secret = |key| options.text(key).map(|id| objects.secret(id)).transpose();
    Ok(match service {
        Service::S3 => match (options.text("access-key-id"), secret("key-secret")?) {
            (Some(id), Some(key)) => {
                Keys::S3 { id: id.to_owned(), secret: key, token: secret("session-token-secret")? }
            }
            (None, None) if !options.contains_key("session-token-secret") => Keys::Environment,
            _ => return Err(generic("'access-key-id' and 'key-secret' must be given together")),
        },
        Service::Gs => secret("credentials-secret")?.map_or(Keys::Environment, Keys::ServiceAccount),
        Service::Az => match (secret("key-secret")?, secret("sas-secret")?) {
            (Some(key), None) => Keys::AzureKey(key),
            (None, Some(sas)) => Keys::AzureSas(sas),
            (None, None) => Keys::Environment,
            _ => return Err(generic("'key-secret' and 'sas-secret' are mutually exclusive")),
        },
    })
}

/// The options that open what an address leads to.
///
/// # Errors
/// If it is malformed.
pub(super) fn uri_options(uri: &str) -> Result<Value, Refusal> {
    let location: ObjectLocation = uri.parse().map_err(|err| of_error(&err))?;
    let bucket = if location.service == Service::Az { "container" } else { "bucket" };
    let mut options = Options::new();
    options.insert("driver".into(), location.service.scheme().into());
    options.insert(bucket.into(), location.bucket.into());
    options.insert("key".into(), location.key.into());
    if !location.endpoints.is_empty() {
        options.insert("endpoint".into(), json!(location.endpoints));
    }
    let texts = [
        ("region", location.region),
        ("profile", location.profile),
        ("account", location.account),
        ("version-id", location.version),
    ];
    options.extend(texts.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.into()))));
    if location.anonymous {
        options.insert("anonymous".into(), true.into());
    }
    Ok(options.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_qmp::schema::{Source, check_type};

    #[test]
    fn addresses_and_options_say_the_same() {
        for uri in [
            "s3://b/a/k?endpoint=http://h:1,https://i&region=r&profile=p&version-id=v&anonymous",
            "gs://b/k",
            "az://c/k?account=a",
        ] {
            let options = check_type("BlockdevOptions", uri_options(uri).unwrap(), Source::Json).unwrap();
            let options = options.as_object().unwrap();
            let service = service(options.text("driver").unwrap()).unwrap();
            assert_eq!(location(service, options).to_string(), uri);
        }
    }
}
