//! Jobs that outlive the process: what is written down about them, where, and how storage is recognised when they go on.
//!
//! - [`state_dir`]: the directory with one file for each job; the only place that touches it. [`record`]: what is in such a file.
//! - [`kept`]: the record of one job, on disk, changed as the job is.
//! - [`storage`]: whether a file, an export or an object is the one that a record speaks of.
//! - [`streamed`]: what `headwater stream` remembers. The daemon's part is its module `jobs::durable`.
//!
//! A record never opens anything. It names what the operator opens again in the same way, and what was recorded is compared with what is found there.
//! What a job has copied is not in it: the image's tables say that.

pub mod kept;
pub mod record;
pub mod state_dir;
pub mod storage;
pub mod streamed;
