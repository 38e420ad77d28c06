//! Manifests, which a source's bytes are checked against.
//!
//! Input: the text of one, whose root is put right so that what follows it counts.
//!
//! Asserted: what is accepted says something of every chunk, as runs and one by one, and is the same when it is written and read again; what isn't is refused with an error
//! that names it.

use crate::Target;
use headwater_block::Manifest;
use headwater_block::manifest::{Builder, Promise, hex};

/// See the module.
pub const TARGET: Target = Target { name: "manifest", run, seeds, max_len: 4096 };

const NAME: &str = "fuzzed.manifest";

fn run(data: &[u8]) {
    let refused = match Manifest::read(data, NAME) {
        Ok(manifest) => return check(&manifest),
        Err(refused) => refused.to_string(),
    };
    assert!(refused.contains(NAME), "{refused} doesn't name the manifest");
    // "the root is A and what the manifest says has B: ..."
    let roots = refused
        .split_once("the root is ")
        .and_then(|(_, rest)| rest.split_once(" and what the manifest says has "));
    let Some((given, rest)) = roots else { return };
    let right = rest.get(..64).expect("a root");
    let text = String::from_utf8_lossy(data).replacen(given, right, 1);
    check(&Manifest::read(text.as_bytes(), NAME).expect("only the root was wrong"));
}

fn check(manifest: &Manifest) {
    let mut text = Vec::new();
    manifest.write(&mut text).expect("memory takes everything");
    assert_eq!(&Manifest::read(&text[..], NAME).expect("what was written"), manifest);
    assert!(String::from_utf8_lossy(&text).contains(&hex(manifest.root())));
    let mut at = 0;
    // Few lines can stand for many chunks.
    for _ in 0..1000 {
        if at >= manifest.chunks() {
            break;
        }
        let (zero, end) = manifest.run(at);
        assert!(end > at && end <= manifest.chunks());
        for chunk in [at, end - 1] {
            assert_eq!(manifest.promise(chunk) == Some(Promise::Zeroes), zero);
        }
        at = end;
    }
    assert_eq!(manifest.promise(manifest.chunks()), None);
}

fn seeds() -> Vec<Vec<u8>> {
    let made = |size, promises: &[(Promise, u64)]| {
        let mut builder = Builder::new(size, 4096).expect("a manifest");
        for (promise, count) in promises {
            builder.push(*promise, *count).expect("there is room");
        }
        let mut text = Vec::new();
        builder.finish().expect("all are there").write(&mut text).expect("memory takes everything");
        text
    };
    let hash = |byte| (Promise::Hash([byte; 32]), 1);
    vec![
        made(0, &[]),
        made(5000, &[hash(1), hash(2)]),
        made(1 << 30, &[(Promise::Zeroes, 1 << 18)]),
        made(40960, &[hash(1), (Promise::Zeroes, 3), hash(2), hash(3), (Promise::Zeroes, 4)]),
    ]
}
