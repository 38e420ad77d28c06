//! A daemon that is killed with SIGKILL at random moments while guests write and a stream runs, and is started again on the same files with the same command
//! line, until the disk stands alone; and then again with another disk.
//!
//! After every kill QEMU's tools look at the files: the image is sound, every byte is one that the guests' logs allow, and what nobody wrote is the source's. The next
//! daemon must have the job again by itself, with its id, its speed and its pause as they were acknowledged. A kill leaves the page cache as it was, so
//! this is about crashes of the process; power cuts are simulated elsewhere.
//!
//! `HEADWATER_KILLS` is how often each test kills, `HEADWATER_SEED` what its choices depend on. Moments are those of a real machine, so that a seed repeats
//! the plan and not every byte of the run.

mod client;
mod disk;
mod guest;
mod job;
mod log;
mod streamed;

use self::client::Client;
use self::disk::{Disk, Origin};
use self::guest::Guest;
use self::job::Job;
use crate::common::monitor::Monitor;
use crate::common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::time::Duration;

/// How many guests use the disk.
const GUESTS: usize = 3;

/// When the daemon is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// While it starts.
    Start,
    /// While it works.
    Work,
    /// While it carries out a command.
    Verb,
    /// When the stream ends.
    End,
    /// When it was told to end.
    Quit,
}

fn moment(rng: &mut StdRng) -> Moment {
    match rng.random_range(0..100) {
        0..20 => Moment::Start,
        20..60 => Moment::Work,
        60..75 => Moment::Verb,
        75..80 => Moment::Quit,
        _ => Moment::End,
    }
}

/// Milliseconds below `most`, as a random duration.
fn up_to(rng: &mut StdRng, most: f64) -> Duration {
    Duration::from_secs_f64(rng.random_range(0.0..most) / 1000.0)
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Kills as often as it is asked to.
fn soak(origin: Origin) {
    let kills = number("HEADWATER_KILLS", 8);
    let seed = number("HEADWATER_SEED", 1);
    println!("replay with HEADWATER_KILLS={kills} HEADWATER_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut killed, mut disks) = (0, 0);
    while killed < kills {
        disks += 1;
        let mut disk = Disk::new(origin, &mut rng);
        let mut job = Job::new(rng.random());
        while killed < kills && disk.is_linked() {
            let moment = moment(&mut rng);
            killed += 1;
            one_life(&mut disk, &mut job, moment, &mut rng);
            disk.look();
            let (linked, records) = (disk.is_linked(), disk.records());
            println!("kill {killed}: {moment:?}, linked: {linked}, {records:?}");
        }
        complete(&mut disk, &mut job);
    }
    println!("{killed} kills, {disks} disks");
}

/// Starts the daemon, lets guests and job work, and kills it.
fn one_life(disk: &mut Disk, job: &mut Job, moment: Moment, rng: &mut StdRng) {
    let mut daemon = disk.start();
    if moment == Moment::Start {
        std::thread::sleep(up_to(rng, 60.0));
        return daemon.kill();
    }
    let mut monitor = ready(disk, &mut daemon);
    job.check(&mut monitor, disk);
    let before = Arc::new(disk.before().clone());
    let guests: Vec<_> = (0..GUESTS)
        .map(|number| {
            let client = Client::connect(&disk.socket(), "disk").expect("the export is there");
            let guest = Guest::new(client, rng.random(), before.clone(), number, GUESTS);
            std::thread::spawn(move || guest.run())
        })
        .collect();
    // That it is started may be what is interrupted.
    if !job.exists() && moment != Moment::Verb {
        // The daemon is alive, so it answers.
        job.start(&mut monitor).expect("an answer");
    }
    match moment {
        Moment::Start | Moment::Work => {
            std::thread::sleep(up_to(rng, 250.0));
            daemon.kill();
        }
        Moment::Quit => {
            std::thread::sleep(up_to(rng, 100.0));
            daemon.signal("TERM");
            std::thread::sleep(up_to(rng, 15.0));
            daemon.kill();
        }
        Moment::Verb => {
            std::thread::sleep(up_to(rng, 60.0));
            let delay = up_to(rng, 8.0);
            let killer = std::thread::spawn(move || {
                std::thread::sleep(delay);
                daemon.kill();
            });
            // Until there is nobody who would answer.
            while job.command(&mut monitor, rng).is_ok() {}
            killer.join().expect("it was killed");
        }
        Moment::End => {
            if job.hurry(&mut monitor).is_ok() {
                let event = if rng.random() { "JOB_STATUS_CHANGE" } else { "BLOCK_JOB_COMPLETED" };
                // It may be paused, or have far to go.
                monitor.limit(Duration::from_millis(1500));
                while let Ok(told) = monitor.event(event) {
                    if matches!(
                        told["data"]["status"].as_str(),
                        None | Some("waiting" | "pending" | "concluded")
                    ) {
                        break;
                    }
                }
                std::thread::sleep(up_to(rng, 3.0));
            }
            daemon.kill();
        }
    }
    disk.used(guests.into_iter().map(|guest| guest.join().expect("the guest found what it must")).collect());
}

/// Waits until the daemon takes commands.
fn ready(disk: &Disk, daemon: &mut Running) -> Monitor {
    Monitor::of(daemon, &disk.monitor())
}

/// Lets the stream come to its end, and looks at what has become of the disk.
fn complete(disk: &mut Disk, job: &mut Job) {
    let mut daemon = disk.start();
    let mut monitor = ready(disk, &mut daemon);
    job.check(&mut monitor, disk);
    if disk.is_linked() {
        if !job.exists() {
            job.start(&mut monitor).expect("an answer");
        }
        job.finish(&mut monitor, disk);
    }
    assert_eq!(disk.records(), [] as [String; 0], "the record of a job that is complete is still there");
    daemon.signal("TERM");
    let ended = daemon.wait().code(0);
    assert_eq!(ended.stderr, "", "the daemon had something to say");
    disk.look();
    assert_sound_or_leaks(disk);
}

/// Our own check agrees with QEMU's.
fn assert_sound_or_leaks(disk: &Disk) {
    let checked = headwater(&["check", &disk.path()]);
    assert!(matches!(checked.code, Some(0 | 3)), "{}{}", checked.stdout, checked.stderr);
}

#[test]
fn over_a_file() {
    soak(Origin::File);
}

#[test]
fn over_an_export() {
    soak(Origin::Nbd);
}

#[test]
fn over_an_object_behind_http() {
    soak(Origin::Http);
}

#[test]
fn of_a_layer_over_a_base_that_stays() {
    soak(Origin::Layer);
}
