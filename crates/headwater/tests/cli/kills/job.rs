//! The stream job as its user knows it: what was acknowledged must be so after the next start, and what was asked for may be.

use super::disk::Disk;
use crate::common::monitor::Monitor;
use crate::common::*;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use std::io::Result;
use std::time::Duration;

/// See the module.
pub(crate) struct Job {
    id: String,
    base: Option<String>,
    must_exist: bool,
    may_exist: bool,
    /// The speeds that it may have.
    speeds: Vec<u64>,
    /// Whether it may be paused, and whether it may not.
    paused: Vec<bool>,
}

impl Job {
    /// One that nobody has started yet.
    pub(crate) fn new(number: u16) -> Self {
        let id = format!("job-{number}");
        Self { id, base: None, must_exist: false, may_exist: false, speeds: Vec::new(), paused: Vec::new() }
    }

    /// True if it is known to exist.
    pub(crate) fn exists(&self) -> bool {
        self.must_exist
    }

    /// Compares what the daemon knows of the job, after its start, with what it was told before.
    pub(crate) fn check(&mut self, monitor: &mut Monitor, disk: &Disk) {
        self.base = disk.base();
        let jobs = monitor.run("query-block-jobs", &json!({}));
        let jobs = jobs.as_array().expect("an array");
        let Some(job) = jobs.first() else {
            if self.must_exist {
                wait("the job is not there, and the disk is not complete", || !disk.is_linked());
            }
            (self.must_exist, self.may_exist) = (false, false);
            return;
        };
        assert!(self.may_exist, "a job is there that nobody started, or that was cancelled: {job}");
        assert_eq!((jobs.len(), job["device"].as_str()), (1, Some(self.id.as_str())), "{job}");
        let speed = job["speed"].as_u64().expect("a number");
        assert!(self.speeds.contains(&speed), "the speed may be one of {:?}: {job}", self.speeds);
        let paused = job["paused"].as_bool().expect("a flag");
        assert!(self.paused.contains(&paused), "paused may be one of {:?}: {job}", self.paused);
        self.must_exist = true;
        (self.speeds, self.paused) = (vec![speed], vec![paused]);
    }

    /// Starts it.
    pub(crate) fn start(&mut self, monitor: &mut Monitor) -> Result<()> {
        self.may_exist = true;
        (self.speeds, self.paused) = (vec![6 * MIB], vec![false]);
        let mut arguments = json!({"job-id": self.id, "device": "disk", "speed": 6 * MIB});
        if let (Some(base), Value::Object(arguments)) = (&self.base, &mut arguments) {
            arguments.insert("base".into(), base.as_str().into());
        }
        let answer = monitor.ask("block-stream", &arguments)?;
        assert!(answer.get("error").is_none(), "{arguments}: {answer}");
        self.must_exist = true;
        Ok(())
    }

    /// Gives it one command or another, and waits for the answer. Whatever is refused is refused because the job is about to end, or has.
    pub(crate) fn command(&mut self, monitor: &mut Monitor, rng: &mut StdRng) -> Result<()> {
        if !self.must_exist {
            return self.start(monitor);
        }
        match rng.random_range(0..10) {
            0..5 => self.set_speed(monitor, MIB * rng.random_range(2..20)),
            5..9 => self.pause(monitor, !self.paused.contains(&true)),
            _ => {
                self.must_exist = false;
                let answer = monitor.ask("job-cancel", &json!({"id": self.id}))?;
                if answer.get("error").is_none() {
                    // Until it is gone, no other can have its name.
                    monitor.event("BLOCK_JOB_CANCELLED").or_else(|_| monitor.event("BLOCK_JOB_COMPLETED"))?;
                }
                self.may_exist = false;
                Ok(())
            }
        }
    }

    fn set_speed(&mut self, monitor: &mut Monitor, speed: u64) -> Result<()> {
        self.speeds.push(speed);
        let answer = monitor.ask("block-job-set-speed", &json!({"device": self.id, "speed": speed}))?;
        if answer.get("error").is_none() {
            self.speeds = vec![speed];
        }
        Ok(())
    }

    fn pause(&mut self, monitor: &mut Monitor, pause: bool) -> Result<()> {
        self.paused.push(pause);
        let verb = if pause { "job-pause" } else { "job-resume" };
        let answer = monitor.ask(verb, &json!({"id": self.id}))?;
        if answer.get("error").is_none() {
            self.paused = vec![pause];
        }
        Ok(())
    }

    /// Lets it copy as fast as it can.
    pub(crate) fn hurry(&mut self, monitor: &mut Monitor) -> Result<()> {
        if self.paused.contains(&true) {
            self.pause(monitor, false)?;
        }
        self.set_speed(monitor, 0)
    }

    /// Waits until it is completed.
    pub(crate) fn finish(&mut self, monitor: &mut Monitor, disk: &Disk) {
        self.hurry(monitor).expect("an answer");
        wait("the stream doesn't end", || !disk.is_linked());
        // The record goes after the link.
        wait("the job doesn't end", || monitor.run("query-jobs", &json!({})) == json!([]));
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = now();
    while !done() {
        assert!(elapsed(start) < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
