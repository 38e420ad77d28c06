//! Ranges of a pinned object, asked for until they are there or the time is over, at whichever endpoint answers.
//!
//! If an endpoint fails, the next one is asked at once; only when all have failed in turn there is a pause ([`Retry`]). The one that
//! answers stays in use. That is safe because the object is pinned: an endpoint with other bytes is found out at the first answer.

use super::connector::Connector;
use super::location::{ObjectLocation, Service};
use super::refusal::Refusal;
use super::store::{self, Store};
use super::{Keys, deepest};
use crate::http::answer::Failure;
use crate::http::{BLOCK, HttpOptions, RangeSource};
use crate::pace::Pace;
use crate::retry::Retry;
use futures_util::StreamExt;
use headwater_block::{Buffer, BufferMut, Error, ErrorKind, LocalFuture, Result};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::time::Duration;

/// The object that was opened, and how to get at it.
pub(super) struct ObjectSource {
    /// For messages.
    label: String,
    /// What to do if access is denied.
    advice: &'static str,
    path: Path,
    stores: Vec<Store>,
    /// The endpoint that is asked first.
    current: Cell<usize>,
    /// The version that was asked for.
    version: Option<String>,
    pinned: ObjectMeta,
    retry: Duration,
    request_timeout: Duration,
    /// Why nothing may be read any more.
    ended: RefCell<Option<Error>>,
}

/// Why a request brought nothing, or not all.
struct Miss {
    failure: Failure,
    /// A server said so, not the network.
    answered: bool,
    /// There is no byte to be had.
    empty: bool,
}

impl Miss {
    fn fatal(kind: ErrorKind, message: String) -> Self {
        Self { failure: Failure::fatal(kind, message), answered: true, empty: false }
    }
}

impl ObjectSource {
    /// Finds the object and reads the start of it.
    pub(super) async fn open(
        location: &ObjectLocation,
        keys: &Keys,
        options: HttpOptions,
    ) -> Result<(Self, Buffer)> {
        let path = Path::parse(&location.key)
            .map_err(|err| Error::new(ErrorKind::InvalidInput, format!("{location}: {err}")))?;
        let (retry, request_timeout) = (options.retry, options.request_timeout);
        let stores = store::open(location, keys, &Connector::new(options))?;
        let mut source = Self {
            label: location.to_string(),
            advice: advice(location.service),
            pinned: unknown(&path),
            path,
            stores,
            current: Cell::new(0),
            version: location.version.clone(),
            retry,
            request_timeout,
            ended: RefCell::default(),
        };
        let (pinned, first) =
            source.locate().await.map_err(|err| err.context(format_args!("cannot open {}", source.label)))?;
        if pinned.e_tag.is_none() {
            tracing::warn!(object = source.label, "the store sends no ETag: some changes may go unnoticed");
        }
        source.pinned = pinned;
        Ok((source, first.freeze()))
    }

    async fn locate(&self) -> Result<(ObjectMeta, BufferMut)> {
        let mut retry = Retry::new(self.retry);
        let mut buf = BufferMut::new(BLOCK as usize);
        let mut tried = 0;
        loop {
            let filled = Cell::new(0);
            let at = self.current.get();
            let miss = match self.ask(at, None, 0..BLOCK, &mut buf, &filled).await {
                Ok(meta) => {
                    buf.truncate(filled.get());
                    return Ok((meta, buf));
                }
                Err(miss) if miss.empty => {
                    buf.truncate(0);
                    return Ok((self.empty(at).await?, buf));
                }
                Err(miss) => miss,
            };
            tried += 1;
            match miss.failure {
                Failure::Again(error, _) if self.next_endpoint(at, &mut tried, &error) => {}
                // At first, a server that isn't there is more likely a wrong address than one that restarts.
                Failure::Again(error, None) if !miss.answered => return Err(error),
                Failure::Again(error, wanted) => retry.pause(error, wanted).await?,
                other => return Err(fatal(other)),
            }
        }
    }

    /// What there is to know of an object that has no bytes.
    async fn empty(&self, at: usize) -> Result<ObjectMeta> {
        let options = GetOptions { head: true, version: self.version.clone(), ..GetOptions::default() };
        let found = self.stores[at].client.get_opts(&self.path, options).await;
        let meta = found.map_err(|err| fatal(self.miss(at, &err).failure))?.meta;
        if meta.size != 0 {
            let message =
                format!("the store has {} bytes of it, and refuses a range from the start", meta.size);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(meta)
    }

    /// After endpoint `at` failed: goes to another one, unless all have been tried by now.
    fn next_endpoint(&self, at: usize, tried: &mut usize, why: &Error) -> bool {
        if self.stores.len() == 1 {
            return false;
        }
        // Another range may have gone on already.
        if self.current.get() == at {
            self.current.set((at + 1) % self.stores.len());
            let endpoint = self.stores[at].endpoint.as_deref().unwrap_or_default();
            tracing::warn!(object = self.label, endpoint, "an endpoint fails, the next one is asked: {why}");
        }
        if *tried < self.stores.len() {
            return true;
        }
        *tried = 0;
        false
    }

    async fn fill(&self, offset: u64, buf: &mut BufferMut) -> Result<()> {
        let mut retry = Retry::new(self.retry);
        let end = offset + buf.len() as u64;
        let filled = Cell::new(0);
        let mut tried = 0;
        while filled.get() < buf.len() {
            self.check()?;
            let before = filled.get();
            let at = self.current.get();
            let range = offset + before as u64..end;
            let miss = match self.ask(at, Some(&self.pinned), range, buf, &filled).await {
                Ok(_) => return Ok(()),
                Err(miss) if miss.empty => {
                    let message = format!("it has fewer than the {} bytes it had", self.pinned.size);
                    return Err(Error::new(ErrorKind::SourceChanged, message));
                }
                Err(miss) => miss,
            };
            if filled.get() > before {
                // It goes on, if slowly.
                retry.restart();
                tried = 0;
            }
            tried += 1;
            match miss.failure {
                Failure::Again(error, _) if self.next_endpoint(at, &mut tried, &error) => {}
                Failure::Again(error, wanted) => retry.pause(error, wanted).await?,
                other => return Err(fatal(other)),
            }
        }
        Ok(())
    }

    /// Asks endpoint `at` once for `range` and puts what comes into `buf` from `filled` on, counting it there. Success means that all came of
    /// `range` that lies within the object.
    async fn ask(
        &self,
        at: usize,
        pinned: Option<&ObjectMeta>,
        range: Range<u64>,
        buf: &mut BufferMut,
        filled: &Cell<usize>,
    ) -> Result<ObjectMeta, Miss> {
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            // A weak ETag never matches.
            if_match: pinned.and_then(|meta| meta.e_tag.clone()).filter(|etag| !etag.starts_with("W/")),
            if_unmodified_since: pinned.filter(|meta| meta.e_tag.is_none()).map(|meta| meta.last_modified),
            version: self.version.clone(),
            ..GetOptions::default()
        };
        let got = self.stores[at].client.get_opts(&self.path, options).await;
        let got = got.map_err(|err| self.miss(at, &err))?;
        if let Some(difference) = pinned.and_then(|then| difference(then, &got.meta)) {
            return Err(Miss::fatal(ErrorKind::SourceChanged, difference));
        }
        let meta = got.meta.clone();
        // The crate has compared it with what was asked for.
        let expected = filled.get() + (got.range.end - got.range.start) as usize;
        let mut bytes = got.into_stream();
        let mut pace = Pace::new(self.request_timeout);
        loop {
            let next = tokio::time::timeout(self.request_timeout, bytes.next()).await;
            let data = match next {
                Err(_) => return Err(self.too_slow("no data")),
                Ok(None) => break,
                Ok(Some(Err(err))) => return Err(self.miss(at, &err)),
                Ok(Some(Ok(data))) => data,
            };
            let from = filled.get();
            if data.len() > expected - from {
                let message = "the server sends more than its response's headers say".to_owned();
                return Err(Miss::fatal(ErrorKind::Corrupt, message));
            }
            // Only here does the buffer take memory.
            buf[from..from + data.len()].copy_from_slice(&data);
            filled.set(from + data.len());
            if pace.is_too_slow(data.len()) && filled.get() < expected {
                return Err(self.too_slow("hardly any data"));
            }
        }
        if filled.get() < expected {
            let missing = expected - filled.get();
            let message = format!("the response ends {missing} bytes early");
            let failure = Failure::again(ErrorKind::Unavailable, message);
            return Err(Miss { failure, answered: true, empty: false });
        }
        Ok(meta)
    }

    fn too_slow(&self, what: &str) -> Miss {
        let message = format!("{what} from the server for {} s", self.request_timeout.as_secs_f32());
        Miss { failure: Failure::again(ErrorKind::TimedOut, message), answered: true, empty: false }
    }

    /// What an error of the crate means.
    fn miss(&self, at: usize, err: &object_store::Error) -> Miss {
        use object_store::Error as E;
        let of = |endpoint: &str| format!("{endpoint}: ");
        let whence = self.stores[at].endpoint.as_deref().map(of).unwrap_or_default();
        let refusal = Refusal::of(err);
        let tell = |error: &Error| {
            let denied = error.kind() == ErrorKind::PermissionDenied
                || refusal.is_some_and(|refusal| refusal.about_credentials);
            let what = match refusal {
                Some(refusal) if refusal.about_credentials => "no credentials: ",
                _ => "",
            };
            let advice = if denied { self.advice } else { "" };
            Error::new(error.kind(), format!("{whence}{what}{error}{advice}"))
        };
        if let Some(Refusal { failure, answered, empty, .. }) = refusal {
            let failure = match failure {
                Failure::Again(error, wanted) => Failure::Again(tell(error), *wanted),
                Failure::Fatal(error) | Failure::Refused(error) => Failure::Fatal(tell(error)),
                Failure::Moved(_) => failure.clone(),
            };
            return Miss { failure, answered: *answered, empty: *empty };
        }
        let kind = match err {
            E::NotFound { .. } => ErrorKind::NotFound,
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => ErrorKind::PermissionDenied,
            E::Precondition { .. } | E::NotModified { .. } => ErrorKind::SourceChanged,
            E::NotSupported { .. } | E::NotImplemented { .. } => ErrorKind::Unsupported,
            // What comes from servers is a refusal; this is of answers that make no sense, and of credentials.
            _ => ErrorKind::Io,
        };
        Miss::fatal(kind, tell(&Error::new(kind, deepest(err))).to_string())
    }
}

impl RangeSource for ObjectSource {
    fn size(&self) -> u64 {
        self.pinned.size
    }

    fn marks(&self) -> Vec<(&'static str, String)> {
        let meta = &self.pinned;
        let mut marks = vec![("Last-Modified", meta.last_modified.to_rfc2822())];
        marks.extend(meta.e_tag.clone().map(|etag| ("ETag", etag)));
        marks.extend(meta.version.clone().map(|version| ("version", version)));
        marks
    }

    fn check(&self) -> Result<()> {
        self.ended.borrow().clone().map_or(Ok(()), Err)
    }

    fn fetch(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        Box::pin(async move {
            let len = buf.len();
            if let Err(error) = self.fill(offset, &mut buf).await {
                let error = if error.kind() == ErrorKind::SourceChanged {
                    let message = format!("the source has changed since it was opened: {error}");
                    let error = Error::new(ErrorKind::SourceChanged, message);
                    self.ended.borrow_mut().get_or_insert(error).clone()
                } else {
                    error
                };
                return Err(error.context(format_args!("read of {len} bytes at {offset} of {}", self.label)));
            }
            Ok(buf)
        })
    }

    fn close(&self) {
        let message = format!("{} was closed", self.label);
        self.ended.borrow_mut().get_or_insert(Error::new(ErrorKind::Closed, message));
    }
}

/// The error of a failure that nothing more is done about.
fn fatal(failure: Failure) -> Error {
    match failure {
        Failure::Again(error, _) | Failure::Refused(error) | Failure::Fatal(error) => error,
        Failure::Moved(_) => Error::new(ErrorKind::Unsupported, "the store redirects"),
    }
}

/// How `now` differs from what was opened, if it does.
fn difference(then: &ObjectMeta, now: &ObjectMeta) -> Option<String> {
    let show = |value: &Option<String>| value.as_deref().unwrap_or("none").to_owned();
    if then.size != now.size {
        Some(format!("its size was {} bytes and is {}", then.size, now.size))
    } else if then.e_tag != now.e_tag {
        Some(format!("its ETag was {} and is {}", show(&then.e_tag), show(&now.e_tag)))
    } else if then.version != now.version {
        Some(format!("its version was {} and is {}", show(&then.version), show(&now.version)))
    } else if then.last_modified != now.last_modified {
        Some(format!("its Last-Modified was {} and is {}", then.last_modified, now.last_modified))
    } else {
        None
    }
}

/// Nothing is known yet.
fn unknown(path: &Path) -> ObjectMeta {
    ObjectMeta {
        location: path.clone(),
        last_modified: Default::default(),
        size: 0,
        e_tag: None,
        version: None,
    }
}

/// What to do if access is denied.
fn advice(service: Service) -> &'static str {
    match service {
        Service::S3 => {
            "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, for a key that may read it; add ?anonymous if everybody may"
        }
        Service::Gs => {
            "; set GOOGLE_APPLICATION_CREDENTIALS for an account that may read it; add ?anonymous if everybody may"
        }
        Service::Az => {
            "; set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN for what may read it; add ?anonymous if everybody may"
        }
    }
}
