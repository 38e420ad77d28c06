//! Every target on what fuzzing starts from, on what was once found, and on changes of these: without libFuzzer, on any machine.

use crate::{TARGETS, Target, mutate::Mutator, target};

/// How many changed inputs are tried unless the environment says otherwise.
const CHANGES: u64 = 300;

fn smoke(name: &str) {
    let Target { run, max_len, .. } = *target(name).expect("a target of this name");
    let named = target(name).expect("a target").inputs().expect("inputs can be read");
    assert!(!named.is_empty(), "{name} starts from nothing");
    for (input, bytes) in &named {
        eprintln!("{name}: {input}");
        assert!(bytes.len() <= max_len, "{name}: {input} has {} bytes, more than {max_len}", bytes.len());
        run(bytes);
    }
    let inputs: Vec<_> = named.into_iter().map(|(_, bytes)| bytes).collect();
    let changes = std::env::var("HEADWATER_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(CHANGES);
    for seed in 0..changes {
        let bytes = Mutator::new(seed).change(&inputs, max_len);
        let _tell = Tell(name, seed, &bytes);
        run(&bytes);
    }
}

/// Says which input it was, when a target panics.
struct Tell<'a>(&'a str, u64, &'a [u8]);

impl Drop for Tell<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(name, seed, bytes) = self;
            let file = std::env::temp_dir().join(format!("headwater-fuzz-{name}-{seed}"));
            let written =
                std::fs::write(&file, bytes).map_or_else(|e| e.to_string(), |()| "written".to_owned());
            eprintln!("{name}: change number {seed} did it: {} ({written})", file.display());
        }
    }
}

macro_rules! smoke {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*

        #[test]
        fn every_target_is_tried_and_has_a_program() {
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            for name in names {
                let program = format!("{}/fuzz_targets/{name}.rs", env!("CARGO_MANIFEST_DIR"));
                assert!(std::fs::exists(&program).unwrap_or(false), "{program} is missing");
            }
        }
    };
}

smoke! {
    http
    manifest
    names
    nbd_client
    nbd_codec
    nbd_server
    options
    qcow2_header
    qcow2_image
    qcow2_io
    qmp
    tls
    vhost_user
}
