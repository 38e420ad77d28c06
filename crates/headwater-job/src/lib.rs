//! headwater-job.
