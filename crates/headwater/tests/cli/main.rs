//! The headwater command as a black box: a process with files, sockets and other programs around it. One binary, because linking several
//! costs more than it gives.

mod bad_input;
mod boot;
mod boot_traces;
mod commands;
mod common;
mod daemon;
mod durable;
mod faults;
mod holds;
mod interrupted;
mod job_limit;
mod kills;
mod malformed;
mod mirrors;
mod outages;
mod room;
mod sandbox;
mod shared;
mod stream;
