//! Measures the file engine: requests of one size at a steady depth for a few seconds.
//!
//! `cargo run --release -p headwater-storage --example file_engine -- FILE [read|write] [BYTES] [DEPTH] [SECONDS] [ring|threads] [direct|buffered]`
//!
//! Prints requests a second and CPU time a request, that of all the process's threads, kernel included. `write` destroys FILE's contents.
//! The peer for comparison: `fio --name=x --filename=FILE --rw=randread --bs=4k --iodepth=32 --direct=1 --ioengine=io_uring`.

use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::{Buffer, BufferMut, Clock, Error, ErrorKind, Node, Result, TokioClock, WriteFlags};
use headwater_storage::file::{Cache, Engine, FileNode, FileOptions, IoMode};
use std::time::Duration;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|err| Error::from_io(err, "start the runtime"))?.block_on(measure())
}

async fn measure() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize, default: &str| args.get(at).map_or(default.to_owned(), Clone::clone);
    let number = |at: usize, default: u64| match args.get(at) {
        None => Ok(default),
        Some(text) => {
            text.parse().map_err(|_| Error::new(ErrorKind::InvalidInput, format!("not a number: {text}")))
        }
    };
    let (path, write) = (word(0, ""), word(1, "read") == "write");
    let (len, depth, seconds) = (number(2, 4096)?, number(3, 32)?, number(4, 5)?);
    let mode = if word(5, "ring") == "ring" { IoMode::Ring } else { IoMode::Threads };
    let cache = if word(6, "direct") == "direct" { Cache::Direct } else { Cache::Buffered };

    let engine = Engine::new(mode)?;
    let node =
        FileNode::open(&engine, &path, FileOptions { read_only: !write, cache, ..FileOptions::default() })?;
    let places = node.size() / len;
    if places == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{path} is smaller than one request")));
    }
    let data = Buffer::copy_of(&vec![0x5a; len as usize]);
    // Any sequence without an order will do.
    let mut place = 88_172_645_463_325_252_u64;
    let mut next = || {
        place ^= place << 13;
        place ^= place >> 7;
        place ^= place << 17;
        let offset = place % places * len;
        let (node, data) = (node.clone(), data.clone());
        async move {
            if write {
                node.write(offset, data, WriteFlags::default()).await
            } else {
                node.read(offset, BufferMut::new(len as usize)).await.map(drop)
            }
        }
    };
    let clock = TokioClock::new();
    let (begin, cpu) = (clock.now(), cpu_time());
    let mut running: FuturesUnordered<_> = (0..depth).map(|_| next()).collect();
    let mut done = 0_u64;
    while let Some(result) = running.next().await {
        result?;
        done += 1;
        if clock.now() - begin < Duration::from_secs(seconds) {
            running.push(next());
        }
    }
    let (elapsed, cpu) = (clock.now() - begin, cpu_time().saturating_sub(cpu));
    println!(
        "{} {}: {:.0} requests/s, {:.0} MiB/s, {:.2} us of CPU each, {:.0}% CPU",
        engine.kind(),
        if node.is_direct() { "direct" } else { "buffered" },
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
