//! The same rules of blkdebug and the same requests through headwater and through qemu-io: the same requests fail, by the same error.

use headwater_block::filter::BlkdebugNode;
use headwater_block::filter::blkdebug::{BlkdebugOptions, InjectError, IoType, SetState};
use headwater_block::{
    Buffer, DebugEvent, Disk, DiskOptions, Edge, Node, Result, TokioClock, WriteFlags, ZeroFlags,
};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_image::raw::{RawNode, RawOptions};
use headwater_sim::{Rng, for_seeds};
use headwater_storage::file::{Cache, Engine, FileNode, FileOptions, IoMode};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

/// The size of the disk in bytes.
const SIZE: u64 = 1 << 20;

/// A request: offset and length in bytes.
#[derive(Debug, Clone, Copy)]
enum Step {
    Read(u64, u64),
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl Step {
    fn command(self) -> String {
        match self {
            Step::Read(offset, len) => format!("read {offset} {len}"),
            Step::Write(offset, len) => format!("write {offset} {len}"),
            Step::Zero(offset, len) => format!("write -z {offset} {len}"),
            Step::Discard(offset, len) => format!("discard {offset} {len}"),
            Step::Flush => "flush".to_owned(),
        }
    }

    async fn run(self, disk: &Rc<Disk>) -> Result<()> {
        match self {
            Step::Read(offset, len) => disk.read(offset, len).await.map(drop),
            Step::Write(offset, len) => {
                disk.write(offset, Buffer::copy_of(&vec![0xcd; len as usize]), WriteFlags::default()).await
            }
            Step::Zero(offset, len) => disk.write_zeroes(offset, len, ZeroFlags::default()).await,
            Step::Discard(offset, len) => disk.discard(offset, len).await,
            Step::Flush => disk.flush().await,
        }
    }
}

/// What became of each request but flushes, of which qemu-io says nothing; and whether any request failed.
#[derive(Debug, PartialEq, Eq)]
struct Outcome(Vec<Option<String>>, bool);

fn to_json(options: &BlkdebugOptions) -> Value {
    let inject = options.inject_error.iter().map(|rule| {
        let mut json = json!({ "event": rule.event.name(), "errno": rule.errno, "once": rule.once, "immediately": rule.immediately });
        for (key, value) in [
            ("state", rule.state.map(|state| json!(state))),
            ("iotype", rule.iotype.map(|kind| json!(kind.name()))),
            ("sector", rule.sector.map(|sector| json!(sector))),
        ] {
            if let Some(value) = value {
                json[key] = value;
            }
        }
        json
    });
    let states = options.set_state.iter().map(|rule| {
        let mut json = json!({ "event": rule.event.name(), "new_state": rule.new_state });
        if let Some(state) = rule.state {
            json["state"] = json!(state);
        }
        json
    });
    let mut json = json!({ "driver": "blkdebug" });
    // QEMU doesn't know an empty list.
    for (key, list) in [("inject-error", inject.collect::<Vec<_>>()), ("set-state", states.collect())] {
        if !list.is_empty() {
            json[key] = json!(list);
        }
    }
    for (key, value) in [
        ("align", options.align),
        ("max-transfer", options.max_transfer),
        ("opt-write-zero", options.opt_write_zero),
        ("max-write-zero", options.max_write_zero),
        ("opt-discard", options.opt_discard),
        ("max-discard", options.max_discard),
    ] {
        if value > 0 {
            json[key] = json!(value);
        }
    }
    json
}

/// Runs the steps in qemu-io; `None` if it isn't installed.
fn in_qemu(format: &str, file: &Path, options: &BlkdebugOptions, steps: &[Step]) -> Option<Outcome> {
    let mut blkdebug = to_json(options);
    blkdebug["image"] = json!({ "driver": "file", "filename": file });
    let image = json!({ "driver": format, "file": blkdebug });
    let mut command = Command::new("qemu-io");
    command.args(["-t", "writeback"]);
    for step in steps {
        command.args(["-c", &step.command()]);
    }
    let Ok(output) = command.arg(format!("json:{image}")).output() else {
        assert!(std::env::var_os("HEADWATER_REQUIRE_TOOLS").is_none(), "qemu-io is not installed");
        return None;
    };
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let of_line = |line: &str| {
        if let Some((_, error)) = line.split_once(" failed: ") {
            return Some(Some(error.to_owned()));
        }
        ["read ", "wrote ", "discard "].iter().any(|done| line.starts_with(done)).then_some(None)
    };
    let outcomes: Vec<_> = text.lines().filter_map(of_line).collect();
    let told = steps.iter().filter(|step| !matches!(step, Step::Flush)).count();
    assert_eq!(outcomes.len(), told, "{}: {text}\n{image}\n{steps:?}", output.status);
    Some(Outcome(outcomes, !output.status.success()))
}

async fn in_headwater(format: &str, file: &Path, options: &BlkdebugOptions, steps: &[Step]) -> Outcome {
    let clock = Rc::new(TokioClock::new());
    let engine = Engine::new(IoMode::Auto).unwrap();
    let file_options = FileOptions { cache: Cache::Buffered, ..FileOptions::default() };
    let file = FileNode::open(&engine, file, file_options).unwrap();
    let growable = DiskOptions { growable: true, ..DiskOptions::default() };
    let edge = Edge::new(Disk::new(file, clock.clone(), growable));
    let blkdebug = BlkdebugNode::new(edge, options.clone()).unwrap();
    let top: Rc<dyn Node> = match format {
        "raw" => RawNode::new(blkdebug, RawOptions::default()).unwrap(),
        _ => Qcow2Node::open(blkdebug, Children::default(), Qcow2Options::default()).await.unwrap(),
    };
    let disk = Disk::new(top, clock, DiskOptions::default());
    let mut outcomes = Vec::new();
    let mut any = false;
    for step in steps {
        let result = step.run(&disk).await;
        any |= result.is_err();
        let error = result.err().map(|err| {
            let code = err.os_code().unwrap_or_else(|| panic!("{step:?}: {err}"));
            let text = std::io::Error::from_raw_os_error(code).to_string();
            text.split(" (os error").next().unwrap_or_default().to_owned()
        });
        if !matches!(step, Step::Flush) {
            outcomes.push(error);
        }
    }
    Outcome(outcomes, any)
}

fn compare(format: &str, options: &BlkdebugOptions, before: &[Step], steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("theirs"), dir.path().join("ours"));
    for file in [&theirs, &ours] {
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(file)
            .arg(SIZE.to_string())
            .status();
        if made.is_err() {
            assert!(std::env::var_os("HEADWATER_REQUIRE_TOOLS").is_none(), "qemu-img is not installed");
            return;
        }
        in_qemu(format, file, &BlkdebugOptions::default(), before);
    }
    let Some(expected) = in_qemu(format, &theirs, options, steps) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let found =
        runtime.block_on(tokio::task::LocalSet::new().run_until(in_headwater(format, &ours, options, steps)));
    assert_eq!(found, expected, "{steps:?}\n{}", to_json(options));
}

/// Events that happen to a raw image.
const RAW_EVENTS: [DebugEvent; 8] = [
    DebugEvent::None,
    DebugEvent::ReadAio,
    DebugEvent::WriteAio,
    DebugEvent::Pwritev,
    DebugEvent::PwritevZero,
    DebugEvent::PwritevDone,
    DebugEvent::FlushToOs,
    DebugEvent::FlushToDisk,
];

fn random_options(rng: &Rng) -> BlkdebugOptions {
    let state = |rng: &Rng| rng.one_in(2).then(|| rng.range(1..4) as u32);
    let kinds = [IoType::Read, IoType::Write, IoType::WriteZeroes, IoType::Discard, IoType::Flush];
    // QEMU cuts requests above the format, so that these two happen to each piece.
    let may_cut = rng.one_in(2);
    let events: Vec<_> = RAW_EVENTS
        .into_iter()
        .filter(|event| !may_cut || !matches!(event, DebugEvent::ReadAio | DebugEvent::WriteAio))
        .collect();
    let inject = |_| InjectError {
        event: *rng.pick(&events),
        state: state(rng),
        iotype: rng.one_in(3).then(|| *rng.pick(&kinds)),
        errno: *rng.pick(&[1, 5, 28, 28, 0, 13]),
        sector: rng.one_in(3).then(|| rng.range(0..16)),
        once: rng.one_in(2),
        immediately: rng.one_in(3),
    };
    let set =
        |_| SetState { event: *rng.pick(&events), state: state(rng), new_state: rng.range(1..4) as u32 };
    let align = *rng.pick(&[0, 0, 0, 512, 4096]);
    let multiple = |rng: &Rng, of: u64| if rng.one_in(3) { of.max(512) * rng.range(1..5) } else { 0 };
    // With an alignment QEMU 10 divides by opt-discard, even if it is 0.
    let (opt_write_zero, opt_discard) = (multiple(rng, align), multiple(rng, align).max(align));
    BlkdebugOptions {
        inject_error: (0..rng.range(1..4)).map(inject).collect(),
        set_state: (0..rng.range(0..4)).map(set).collect(),
        align,
        max_transfer: if may_cut { multiple(rng, align) } else { 0 },
        opt_write_zero,
        max_write_zero: multiple(rng, opt_write_zero.max(align)),
        opt_discard,
        max_discard: multiple(rng, opt_discard.max(align)),
    }
}

/// `unit`: what requests are multiples of. With an alignment, QEMU rounds requests in the node that asks for it, and headwater above the format, so
/// that different events happen to what isn't aligned.
fn random_steps(rng: &Rng, unit: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    for _ in 0..rng.range(4..20) {
        let units = rng.byte_range(16 * 1024 / unit, 6 * 1024 / unit + 1, 512);
        let (offset, len) = (units.start * unit, (units.end - units.start) * unit);
        let step = match rng.range(0..6) {
            0 | 1 => Step::Read(offset, len),
            2 => Step::Write(offset, len),
            3 => Step::Zero(offset, len),
            4 => Step::Discard(offset, len),
            _ => Step::Flush,
        };
        if matches!(step, Step::Flush) {
            // QEMU leaves a flush out that has nothing to do.
            steps.push(Step::Write(offset, len));
        }
        steps.push(step);
    }
    steps
}

#[test]
fn raw_images_fail_where_qemus_do() {
    for_seeds(60, |seed| {
        let rng = Rng::new(seed);
        let options = random_options(&rng);
        let steps = random_steps(&rng, options.align.max(1));
        compare("raw", &options, &[Step::Write(0, 32 * 1024)], &steps);
    });
}

#[test]
fn qcow2_images_fail_where_qemus_do() {
    let before = [Step::Write(0, 64 * 1024), Step::Write(256 * 1024, 4096)];
    let steps = [
        Step::Read(0, 512),
        Step::Write(512, 512),
        Step::Read(512, 512),
        Step::Write(128 * 1024, 512),
        Step::Write(128 * 1024, 512),
        Step::Read(128 * 1024, 4096),
        Step::Write(320 * 1024 + 512, 1024),
        Step::Write(320 * 1024 + 512, 1024),
        Step::Read(256 * 1024, 8192),
        // The last: headwater takes no more changes after a flush has failed.
        Step::Flush,
    ];
    use DebugEvent as E;
    for event in [E::L2Load, E::ReadAio, E::WriteAio, E::ClusterAlloc, E::RefblockLoad, E::FlushToOs] {
        for once in [true, false] {
            let inject_error = vec![InjectError { once, errno: 28, ..InjectError::new(event) }];
            compare(
                "qcow2",
                &BlkdebugOptions { inject_error, ..BlkdebugOptions::default() },
                &before,
                &steps,
            );
        }
    }
}
