//! From a location and credentials to a client of the crate `object_store`.
//!
//! The environment is read as the tools of these services read it: the crate knows its variables, this adds the files of AWS and the
//! names that Azure's own tool has. What the location says counts more.

use super::aws_files;
use super::connector::Connector;
use super::location::{ObjectLocation, Service};
use super::{Keys, deepest};
use headwater_block::{Error, ErrorKind, Result};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ObjectStore, RetryConfig, StaticCredentialProvider};
use std::env;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// One way to the bucket.
pub(super) struct Store {
    pub(super) client: Rc<dyn ObjectStore>,
    /// For messages; none if it is the service's own.
    pub(super) endpoint: Option<String>,
}

/// The clients for `location`: one for each endpoint. Must be called within a `LocalSet`.
///
/// # Errors
/// `InvalidInput` for settings that contradict each other or lack something, and those of the files that the environment names.
pub(super) fn open(location: &ObjectLocation, keys: &Keys, connector: &Connector) -> Result<Vec<Store>> {
    match location.service {
        Service::S3 => s3(location, keys, connector),
        Service::Gs => gs(location, keys, connector),
        Service::Az => az(location, keys, connector),
    }
}

/// The files that credentials for `service` may come from, whether they exist or not.
pub(super) fn files(service: Service) -> Vec<PathBuf> {
    let variables: &[&str] = match service {
        Service::S3 => &["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"],
        Service::Gs => {
            &["GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"]
        }
        Service::Az => &["AZURE_FEDERATED_TOKEN_FILE"],
    };
    let named = variables.iter().filter_map(|name| variable(name)).map(PathBuf::from);
    let usual: Vec<PathBuf> = match service {
        Service::S3 => aws_files::paths().into_iter().flatten().collect(),
        Service::Gs => variable("HOME")
            .map(|home| PathBuf::from(home).join(".config/gcloud/application_default_credentials.json"))
            .into_iter()
            .collect(),
        Service::Az => Vec::new(),
    };
    named.chain(usual).collect()
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Trying again is the business of those who wait.
fn no_retry() -> RetryConfig {
    RetryConfig { max_retries: 0, retry_timeout: Duration::ZERO, ..RetryConfig::default() }
}

fn bad(location: &ObjectLocation, err: &object_store::Error) -> Error {
    let message = format!("cannot reach {location} as the environment says: {}", deepest(err));
    Error::new(ErrorKind::InvalidInput, message)
}

/// One client for each endpoint, or one for the service's own.
fn each(
    location: &ObjectLocation,
    own: Option<String>,
    build: impl Fn(Option<&str>) -> object_store::Result<Rc<dyn ObjectStore>>,
) -> Result<Vec<Store>> {
    let make = |endpoint: Option<&String>, shown: Option<String>| {
        let client = build(endpoint.map(String::as_str)).map_err(|err| bad(location, &err))?;
        Ok(Store { client, endpoint: shown })
    };
    if location.endpoints.is_empty() {
        return Ok(vec![make(None, own)?]);
    }
    location.endpoints.iter().map(|endpoint| make(Some(endpoint), Some(endpoint.clone()))).collect()
}

fn s3(location: &ObjectLocation, keys: &Keys, connector: &Connector) -> Result<Vec<Store>> {
    use AmazonS3ConfigKey as Key;
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(&location.bucket)
        .with_retry(no_retry())
        .with_client_options(connector.options())
        .with_http_connector(connector.clone());
    let is_set = |builder: &AmazonS3Builder, key| builder.get_config_value(&key).is_some();
    // Whatever else gives credentials to a machine or a container.
    let given = is_set(&builder, Key::AccessKeyId)
        || is_set(&builder, Key::WebIdentityTokenFile)
        || is_set(&builder, Key::ContainerCredentialsRelativeUri)
        || is_set(&builder, Key::ContainerCredentialsFullUri);
    let asked = location.profile.as_deref();
    let told = location.anonymous || matches!(keys, Keys::S3 { .. });
    let profile = match aws_files::read(asked) {
        // Then nothing of it matters but the region.
        Err(err) if asked.is_none() && (told || given) => {
            tracing::debug!("{err}");
            aws_files::Profile::default()
        }
        read => read?,
    };
    if let Some(region) = profile.region
        && !is_set(&builder, Key::Region)
    {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = profile.endpoint
        && !is_set(&builder, Key::Endpoint)
    {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &location.region {
        builder = builder.with_region(region);
    }
    let from_profile = profile.keys.filter(|_| asked.is_some() || !given);
    let set = match keys {
        Keys::S3 { id, secret, token } => Some((id.clone(), secret.clone(), token.clone())),
        _ => from_profile,
    };
    if let Some((key_id, secret_key, token)) = set {
        // Whole: a token that is in the environment belongs to the key there.
        let credential = AwsCredential { key_id, secret_key, token };
        builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)));
    }
    if location.anonymous {
        builder = builder.with_skip_signature(true);
    }
    let own = builder
        .get_config_value(&Key::S3Endpoint)
        .or_else(|| builder.get_config_value(&Key::Endpoint))
        .filter(|endpoint| !endpoint.is_empty());
    each(location, own, |endpoint| {
        let builder = builder.clone();
        let builder = match endpoint {
            Some(endpoint) => builder.with_config(Key::S3Endpoint, endpoint),
            None => builder,
        };
        Ok(Rc::new(builder.build()?))
    })
}

fn gs(location: &ObjectLocation, keys: &Keys, connector: &Connector) -> Result<Vec<Store>> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(&location.bucket)
        .with_retry(no_retry())
        .with_client_options(connector.options())
        .with_http_connector(connector.clone());
    if let Keys::ServiceAccount(key) = keys {
        builder = builder.with_service_account_key(key);
    }
    if location.anonymous {
        builder = builder.with_skip_signature(true);
    }
    let own = builder.get_config_value(&GoogleConfigKey::BaseUrl);
    each(location, own, |endpoint| {
        let builder = builder.clone();
        let builder = match endpoint {
            Some(endpoint) => builder.with_base_url(endpoint),
            None => builder,
        };
        Ok(Rc::new(builder.build()?))
    })
}

fn az(location: &ObjectLocation, keys: &Keys, connector: &Connector) -> Result<Vec<Store>> {
    use AzureConfigKey as Key;
    let mut builder = MicrosoftAzureBuilder::from_env()
        .with_container_name(&location.bucket)
        .with_retry(no_retry())
        .with_client_options(connector.options())
        .with_http_connector(connector.clone());
    for (key, name) in [(Key::AccountName, "AZURE_STORAGE_ACCOUNT"), (Key::AccessKey, "AZURE_STORAGE_KEY")] {
        if let (None, Some(value)) = (builder.get_config_value(&key), variable(name)) {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(account) = &location.account {
        builder = builder.with_account(account);
    }
    builder = match keys {
        Keys::AzureKey(key) => builder.with_access_key(key),
        Keys::AzureSas(token) => builder.with_config(Key::SasKey, token),
        _ => builder,
    };
    if builder.get_config_value(&Key::AccountName).is_none() {
        let message = format!(
            "{location}: the storage account is missing; add ?account=NAME or set AZURE_STORAGE_ACCOUNT_NAME"
        );
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    if location.anonymous {
        builder = builder.with_skip_signature(true);
    }
    let own = builder.get_config_value(&Key::Endpoint);
    each(location, own, |endpoint| {
        let builder = builder.clone();
        let builder = match endpoint {
            Some(endpoint) => builder.with_endpoint(endpoint.to_owned()),
            None => builder,
        };
        Ok(Rc::new(builder.build()?))
    })
}
