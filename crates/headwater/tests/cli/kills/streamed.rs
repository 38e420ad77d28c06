//! `headwater stream`, killed at random moments like the daemon, and started again with the same command: the rate that was set through the control socket, and whether
//! it is paused, are as they were acknowledged.

use super::client::Client;
use super::disk::{Disk, Origin};
use super::guest::Guest;
use super::{GUESTS, assert_sound_or_leaks, number, up_to};
use crate::common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::io::{BufRead, BufReader, ErrorKind, Result, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// The rate on the command line.
const RATE: u64 = 6 * MIB;

/// A connection to the control socket.
struct Control(BufReader<UnixStream>);

impl Control {
    fn connect(path: &str) -> Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self(BufReader::new(socket)))
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.0.get_mut(), "{command}")?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        if line.ends_with('\n') { Ok(line) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }
}

/// What is known of the stream.
struct Known {
    rates: Vec<u64>,
    paused: Vec<bool>,
}

impl Known {
    /// Compares what it says of itself with what it was told.
    fn check(&mut self, control: &mut Control) {
        let answer = control.ask("status").expect("an answer");
        let status: Value = serde_json::from_str(answer.strip_prefix("ok ").expect("ok")).expect("JSON");
        if status["state"] == "completed" {
            return;
        }
        let rate = status["rate_limit"].as_u64().expect("a number");
        assert!(self.rates.contains(&rate), "the rate may be one of {:?}: {status}", self.rates);
        let paused = status["state"] == "paused";
        assert!(self.paused.contains(&paused), "paused may be one of {:?}: {status}", self.paused);
        (self.rates, self.paused) = (vec![rate], vec![paused]);
    }

    fn set_rate(&mut self, control: &mut Control, rate: u64) -> Result<()> {
        self.rates.push(rate);
        if control.ask(&format!("rate {rate}"))?.starts_with("ok") {
            self.rates = vec![rate];
        }
        Ok(())
    }

    fn pause(&mut self, control: &mut Control, pause: bool) -> Result<()> {
        self.paused.push(pause);
        if control.ask(if pause { "pause" } else { "resume" })?.starts_with("ok") {
            self.paused = vec![pause];
        }
        Ok(())
    }

    fn hurry(&mut self, control: &mut Control) -> Result<()> {
        if self.paused.contains(&true) {
            self.pause(control, false)?;
        }
        self.set_rate(control, 0)
    }
}

fn ready(disk: &Disk, running: &mut Running) -> Control {
    running.wait_for_socket(&disk.monitor());
    Control::connect(&disk.monitor()).expect("it listens")
}

fn one_life(disk: &mut Disk, known: &mut Known, rng: &mut StdRng) {
    let mut running = disk.stream(RATE);
    let moment = rng.random_range(0..100);
    if moment < 20 {
        std::thread::sleep(up_to(rng, 60.0));
        return running.kill();
    }
    let mut control = ready(disk, &mut running);
    known.check(&mut control);
    let before = Arc::new(disk.before().clone());
    let guests: Vec<_> = (0..GUESTS)
        .map(|number| {
            let client = Client::connect(&disk.socket(), "disk").expect("the export is there");
            let guest = Guest::new(client, rng.random(), before.clone(), number, GUESTS);
            std::thread::spawn(move || guest.run())
        })
        .collect();
    match moment {
        ..60 => {
            std::thread::sleep(up_to(rng, 250.0));
            running.kill();
        }
        60..80 => {
            let delay = up_to(rng, 12.0);
            let killer = std::thread::spawn(move || {
                std::thread::sleep(delay);
                running.kill();
            });
            loop {
                let asked = match rng.random() {
                    true => known.set_rate(&mut control, MIB * rng.random_range(2..20)),
                    false => known.pause(&mut control, !known.paused.contains(&true)),
                };
                if asked.is_err() {
                    break;
                }
            }
            killer.join().expect("it was killed");
        }
        _ => {
            known.hurry(&mut control).expect("an answer");
            let start = now();
            while disk.is_linked() && elapsed(start) < Duration::from_millis(1500) {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(up_to(rng, 3.0));
            running.kill();
        }
    }
    disk.used(guests.into_iter().map(|guest| guest.join().expect("the guest found what it must")).collect());
}

/// Lets the stream come to its end, and looks at what has become of the disk.
fn complete(disk: &mut Disk, known: &mut Known) {
    let mut running = disk.stream(RATE);
    let mut control = ready(disk, &mut running);
    known.check(&mut control);
    if disk.is_linked() {
        // Unless it ends by itself.
        let _ = known.hurry(&mut control);
    }
    running.wait_until("end of the stream", |running| running.err().contains("stays served"));
    assert!(!disk.is_linked());
    assert_eq!(disk.remembered(), [] as [String; 0], "it is remembered although it is complete");
    running.signal("TERM");
    running.wait().code(0);
    disk.look();
    assert_sound_or_leaks(disk);
}

#[test]
fn of_headwater_stream() {
    let (kills, seed) = (number("HEADWATER_KILLS", 8), number("HEADWATER_SEED", 1));
    println!("replay with HEADWATER_KILLS={kills} HEADWATER_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut killed, mut disks) = (0, 0);
    while killed < kills {
        disks += 1;
        let mut disk = Disk::new(Origin::File, &mut rng);
        let mut known = Known { rates: vec![RATE], paused: vec![false] };
        while killed < kills && disk.is_linked() {
            killed += 1;
            one_life(&mut disk, &mut known, &mut rng);
            disk.look();
            println!("kill {killed}, linked: {}, {:?}", disk.is_linked(), disk.remembered());
        }
        complete(&mut disk, &mut known);
    }
    println!("{killed} kills, {disks} disks");
}
