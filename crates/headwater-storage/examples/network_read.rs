//! Measures reading from a server: requests of one size at a steady depth, in order or anywhere.
//!
//! `cargo run --release -p headwater-storage --example network_read -- URI [BYTES] [DEPTH] [TOTAL] [ordered|random]`
//!
//! Prints the rate, and the CPU time of this process. The peer for comparison: `nbdcopy --requests=DEPTH --request-size=BYTES URI null:`.

use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::{BufferMut, Clock, Error, ErrorKind, Result, TokioClock};
use headwater_storage::file::{Engine, IoMode};
use headwater_storage::open::{OpenOptions, open_protocol};
use std::time::Duration;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|err| Error::from_io(err, "start the runtime"))?;
    tokio::task::LocalSet::new().block_on(&runtime, measure())
}

async fn measure() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| match args.get(at) {
        None => Ok(default),
        Some(text) => {
            text.parse().map_err(|_| Error::new(ErrorKind::InvalidInput, format!("not a number: {text}")))
        }
    };
    let (len, depth) = (number(1, 1 << 20)?, number(2, 32)?);
    let random = args.get(4).is_some_and(|order| order == "random");
    let options = OpenOptions::new(Engine::new(IoMode::Threads)?).read_only(true);
    let clock = TokioClock::new();
    let node = open_protocol(args.first().map_or("", |uri| uri), &options).await?;
    let places = node.size() / len;
    let requests = number(3, node.size())? / len;
    if places == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "the source is smaller than one request"));
    }
    // Any sequence without an order will do.
    let mut place = 88_172_645_463_325_252_u64;
    let mut started = 0;
    let mut next = || {
        place ^= place << 13;
        place ^= place >> 7;
        place ^= place << 17;
        let at = if random { place } else { started } % places * len;
        started += 1;
        let node = node.clone();
        async move { node.read(at, BufferMut::new(len as usize)).await.map(drop) }
    };
    let (begin, cpu) = (clock.now(), cpu_time());
    let mut running: FuturesUnordered<_> = (0..depth.min(requests)).map(|_| next()).collect();
    let mut left = requests.saturating_sub(depth);
    let mut done = 0_u64;
    while let Some(result) = running.next().await {
        result?;
        done += 1;
        if left > 0 {
            left -= 1;
            running.push(next());
        }
    }
    let (elapsed, cpu) = (clock.now() - begin, cpu_time().saturating_sub(cpu));
    println!(
        "{} in {:.1} ms; {:.0} requests/s, {:.0} MiB/s, {:.2} us of CPU each, {:.0}% CPU",
        node.driver(),
        begin.as_secs_f64() * 1e3,
        done as f64 / elapsed.as_secs_f64(),
        (done * len) as f64 / elapsed.as_secs_f64() / f64::from(1 << 20),
        cpu.as_secs_f64() * 1e6 / done as f64,
        cpu.as_secs_f64() / elapsed.as_secs_f64() * 100.0,
    );
    node.close().await
}

/// What the process's threads spent so far.
fn cpu_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanos = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}
