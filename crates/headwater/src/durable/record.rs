//! What is written down about a job, as text: JSON, with a name for the format and a version.
//!
//! ```json
//! {
//!   "format": "headwater-job",
//!   "version": 1,
//!   "command": "block-stream",
//!   "id": "fill",
//!   "arguments": {"job-id": "fill", "device": "disk"},
//!   "speed": 50000000,
//!   "paused": false,
//!   "link": {"was": "golden.raw", "becomes": null},
//!   "written": [{"name": "disk.qcow2", "object": {"inode": "1234"}}],
//!   "read": [{"name": "golden.raw", "size": 1048576, "contents": {"time of modification": "@1700000000.000000001"}}]
//! }
//! ```
//!
//! A `"weight"` is there if a user has set one, a `"hold"` likewise, and a `"boot-trace"`, with its text, if the job was given one. A file of another format or version, with a field too many or too few, is refused as a whole: half of a record
//! may lead to the wrong disk.

use super::storage::Storage;
use headwater_block::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

#[cfg(test)]
mod tests;

/// The name of the format.
const FORMAT: &str = "headwater-job";

/// The version that is written, and the only one that is read.
const VERSION: u64 = 1;

/// How the backing link of the image that is written changes at the job's end; by this it is known whether it has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkChange {
    /// The name in the header when the job was started.
    pub was: Option<String>,
    /// The name that the job will leave there.
    pub becomes: Option<String>,
}

/// A job, as it is to be started again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// What started it: a QMP command, or `stream`.
    pub command: String,
    /// Its id.
    pub id: String,
    /// The command's arguments as they were given.
    pub arguments: Map<String, Value>,
    /// In bytes per second, as it was last set; 0 is without limit.
    pub speed: u64,
    /// A user has paused it.
    pub paused: bool,
    /// Among the jobs of a daemon, if a user has set it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// For how long it waits for its source, if a user has set it: as the option `--hold` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<String>,
    /// The text of the boot trace that says what is copied first. The file that it came from may be gone, or speak of another image by now.
    #[serde(default, rename = "boot-trace", skip_serializing_if = "Option::is_none")]
    pub boot_trace: Option<String>,
    /// What becomes of the backing link.
    pub link: LinkChange,
    /// The image whose link changes, first, and everything else that the job writes to.
    pub written: Vec<Storage>,
    /// What the job reads and nobody changes meanwhile.
    pub read: Vec<Storage>,
}

impl Record {
    /// As it is written to a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut whole = Map::new();
        whole.insert("format".into(), FORMAT.into());
        whole.insert("version".into(), VERSION.into());
        // Maps with text as keys, numbers and text: there is nothing in it that JSON lacks.
        if let Ok(Value::Object(fields)) = serde_json::to_value(self) {
            whole.extend(fields);
        }
        let mut text = format!("{:#}", Value::Object(whole)).into_bytes();
        text.push(b'\n');
        text
    }

    /// Reads what [`Record::encode`] wrote; `shown` is how people call the file.
    ///
    /// # Errors
    /// `Corrupt` if it is something else or damaged, `Unsupported` if another version of headwater wrote it.
    pub fn decode(bytes: &[u8], shown: &str) -> Result<Self> {
        let useless = |why: String| Error::new(ErrorKind::Corrupt, format!("{shown}: {why}"));
        let value = serde_json::from_slice(bytes).map_err(|err| useless(format!("it is damaged ({err})")))?;
        let Value::Object(mut fields) = value else {
            return Err(useless("it isn't a state file of headwater".into()));
        };
        if fields.remove("format").as_ref().and_then(Value::as_str) != Some(FORMAT) {
            return Err(useless(format!(
                "it isn't a state file of headwater: its format is not \"{FORMAT}\""
            )));
        }
        match fields.remove("version").as_ref().and_then(Value::as_u64) {
            Some(VERSION) => {}
            Some(other) => {
                let message = format!(
                    "{shown}: it has version {other}, and this headwater knows version {VERSION}; use the headwater that wrote it"
                );
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            None => return Err(useless("it is damaged: it has no version".into())),
        }
        let record = serde_json::from_value::<Self>(Value::Object(fields));
        let record = record.map_err(|err| useless(format!("it is damaged ({err})")))?;
        if record.written.is_empty() {
            return Err(useless("it is damaged: it doesn't say which image is written".into()));
        }
        Ok(record)
    }
}
