//! Commands of our own, which QEMU doesn't have: what jobs share, what guests are promised, and what is told of both. Their names begin with `headwater-`.

use super::commands::Commands;
use super::failure::{Refusal, generic};
use super::graph::open::{Options, Read};
use super::graph::{GraphNode, holds};
use super::jobs::{Job, refused};
use crate::cli::reach::show_patience;
use headwater_block::SharedLimiter;
use headwater_job::GuestLatencyGoal;
use serde_json::{Value, json};
use std::rc::Rc;
use std::time::Duration;

/// The longest time that copies may be allowed to add: more is no wait for a disk.
const MOST_LATENCY: Duration = Duration::from_secs(60);

impl Commands {
    /// Carries out a command of our own; none if it isn't one.
    pub(super) async fn own(&self, name: &str, args: &Options) -> Option<Result<Value, Refusal>> {
        let done = match name {
            "headwater-query" => return Some(Ok(self.describe())),
            "headwater-set-job-limit" => {
                self.jobs.limit.set_rate(args.number("rate").unwrap_or(0));
                Ok(())
            }
            "headwater-set-job-weight" => self.set_weight(args).await,
            "headwater-set-guest-latency" => self.set_guest_latency(args),
            "headwater-set-job-hold" => self.set_job_hold(args).await,
            "headwater-set-hold" => {
                let _turn = self.turn.take().await;
                self.graph.set_hold(args.text("node-name").unwrap_or_default(), args.text("hold"))
            }
            "headwater-record-boot-trace" => self.record_boot_trace(args).await,
            _ => return None,
        };
        Some(done.map(|()| json!({})))
    }

    fn describe(&self) -> Value {
        json!({
            "job-limit": self.jobs.limit.rate(),
            "jobs": self.jobs.all().iter().map(|job| own_of_job(job)).collect::<Value>(),
            "nodes": self.graph.nodes().iter().map(|node| self.own_of_node(node)).collect::<Value>(),
        })
    }

    async fn set_weight(&self, args: &Options) -> Result<(), Refusal> {
        let job = self.jobs.find(args.text("id").unwrap_or_default())?;
        let (least, most) = SharedLimiter::WEIGHTS.into_inner();
        let weight = args.number("weight").and_then(|weight| u32::try_from(weight).ok());
        let weight = weight.filter(|weight| SharedLimiter::WEIGHTS.contains(weight));
        let weight = weight
            .ok_or_else(|| generic(format!("Parameter 'weight' expects a number from {least} to {most}")))?;
        job.handle.set_weight(weight).map_err(|illegal| refused(&job, &illegal))?;
        job.write_down("set-weight").await
    }

    fn set_guest_latency(&self, args: &Options) -> Result<(), Refusal> {
        let job = self.jobs.find(args.text("id").unwrap_or_default())?;
        let goal = match args.number("microseconds").map(Duration::from_micros) {
            None => GuestLatencyGoal::Relative,
            Some(time) if !time.is_zero() && time <= MOST_LATENCY => GuestLatencyGoal::Added(time),
            Some(_) => {
                let most = MOST_LATENCY.as_micros();
                return Err(generic(format!("Parameter 'microseconds' expects a number from 1 to {most}")));
            }
        };
        job.handle.set_guest_latency(goal).map_err(|illegal| refused(&job, &illegal))
    }

    async fn set_job_hold(&self, args: &Options) -> Result<(), Refusal> {
        let job = self.jobs.find(args.text("id").unwrap_or_default())?;
        let patience = holds::parse("hold", args.text("hold").unwrap_or_default())?;
        job.handle.set_patience(patience).map_err(|illegal| refused(&job, &illegal))?;
        job.write_down("set-hold").await
    }

    async fn record_boot_trace(&self, args: &Options) -> Result<(), Refusal> {
        let _turn = self.turn.take().await;
        let node = self.graph.node(args.text("node-name").unwrap_or_default())?;
        match args.text("file") {
            Some(file) => self.boot_traces.start(&node, file).await,
            None => self.boot_traces.end(&node.name).await,
        }
    }

    fn own_of_node(&self, node: &Rc<GraphNode>) -> Value {
        let stats = node.disk.stats();
        let mut told = json!({
            "node-name": node.name,
            "held": stats.held.get(),
            "held-in-all": stats.held_in_all.get(),
            "longest-hold": stats.longest_hold.get().as_millis() as u64,
            "retries": stats.retries.get(),
            "outages": node.disk.outage().outages(),
            "hold": show_patience(node.disk.options().patience),
        });
        if let (Value::Object(fields), Some(file)) = (&mut told, self.boot_traces.file(&node.name)) {
            fields.insert("records-boot-trace".into(), file.into());
        }
        told
    }
}

fn own_of_job(job: &Job) -> Value {
    let progress = job.handle.progress();
    let mut told = json!({
        "id": job.id,
        "weight": job.handle.weight(),
        "hold": show_patience(job.handle.patience()),
        "rate": progress.rate,
        "zeroes": progress.zeroes,
        "space-needed": progress.needs,
    });
    let Value::Object(fields) = &mut told else { return told };
    if let GuestLatencyGoal::Added(time) = job.handle.guest_latency() {
        fields.insert("guest-latency".into(), json!(time.as_micros() as u64));
    }
    if let Some(left) = progress.eta {
        fields.insert("seconds-left".into(), left.as_secs().into());
    }
    if let Some(free) = progress.free {
        fields.insert("space-free".into(), free.into());
    }
    told
}
