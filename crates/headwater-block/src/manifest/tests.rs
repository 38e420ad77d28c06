//! The text of manifests, and what is looked up in them.

use super::*;
use proptest::prelude::*;

fn made(size: u64, chunk: u32, promises: &[Promise]) -> Manifest {
    let mut builder = Builder::new(size, chunk).unwrap();
    for promise in promises {
        builder.push(*promise, 1).unwrap();
    }
    builder.finish().unwrap()
}

fn text(manifest: &Manifest) -> Vec<u8> {
    let mut text = Vec::new();
    manifest.write(&mut text).unwrap();
    text
}

fn promises() -> impl Strategy<Value = Vec<Promise>> {
    let promise = prop_oneof![Just(Promise::Zeroes), any::<Hash>().prop_map(Promise::Hash)];
    proptest::collection::vec(promise, 0..40)
}

proptest! {
    #[test]
    fn what_is_written_is_read_back_and_found(promises in promises(), short in 0_u64..4096) {
        let size = (promises.len() as u64 * 4096).saturating_sub(short);
        let manifest = made(size, 4096, &promises);
        prop_assert_eq!(&Manifest::read(&text(&manifest)[..], "m").unwrap(), &manifest);
        for (at, promise) in (0..).zip(&promises) {
            prop_assert_eq!(manifest.promise(at), Some(*promise));
            let (zero, end) = manifest.run(at);
            prop_assert_eq!(zero, *promise == Promise::Zeroes);
            prop_assert!(end > at && end <= manifest.chunks());
            prop_assert!(promises[at as usize..end as usize].iter().all(|p| (*p == Promise::Zeroes) == zero));
        }
        prop_assert_eq!(manifest.promise(manifest.chunks()), None);
    }

    #[test]
    fn a_manifest_that_was_changed_anywhere_is_refused(promises in promises(), at: prop::sample::Index, to: u8) {
        let mut text = text(&made(promises.len() as u64 * 4096, 4096, &promises));
        let at = at.index(text.len());
        prop_assume!(text[at] != to);
        text[at] = to;
        prop_assert!(Manifest::read(&text[..], "m").is_err());
    }

    #[test]
    fn any_text_is_refused_or_read(text: Vec<u8>) {
        let _ = Manifest::read(&text[..], "m");
    }
}

#[test]
fn claims_cost_no_memory_and_lies_are_told_apart() {
    let refused = |text: &str| Manifest::read(text.as_bytes(), "m").unwrap_err();
    let root = "0".repeat(64);
    for (wrong, line) in [
        ("", "line 1"),
        ("headwater-manifest 1\n", "line 2"),
        ("headwater-manifest 1\nsize 01\n", "line 2"),
        ("headwater-manifest 1\nsize 1\nchunk 5000\n", "line 4"),
        (&format!("headwater-manifest 1\nsize 18446744073709551615\nchunk 4096\nroot {root}\n"), "line 4"),
        (&format!("headwater-manifest 1\nsize 4096\nchunk 4096\nroot {root}\nzero 2\n"), "line 5"),
        (&format!("headwater-manifest 1\nsize 4096\nchunk 4096\nroot {root}\nzero 0\n"), "line 5"),
        (&format!("headwater-manifest 1\nsize 4096\nchunk 4096\nroot {root}\nzero 1\n"), "the root is"),
        (&format!("headwater-manifest 1\nsize 4096\nchunk 4096\nroot {root}\n"), "missing"),
        (&"x".repeat(1000), "line 1"),
    ] {
        let err = refused(wrong);
        assert_eq!(err.kind(), ErrorKind::Corrupt, "{err}");
        assert!(err.to_string().contains(line), "{err}");
    }
    assert_eq!(refused("headwater-manifest 2\n").kind(), ErrorKind::Unsupported);
}

#[test]
fn large_files_have_larger_chunks() {
    assert_eq!(chunk_for(10 << 30), DEFAULT_CHUNK);
    assert_eq!(chunk_for(1 << 40), DEFAULT_CHUNK);
    assert_eq!(chunk_for((1 << 40) + 1), 2 * DEFAULT_CHUNK);
    assert!(Builder::new(1 << 46, chunk_for(1 << 46)).is_ok());
    assert!(Builder::new(1 << 47, chunk_for(1 << 47)).is_err());
}
