//! Invariants that are absences: what a part of the tree must never mention, outside comments and tests.

use crate::tree::File;

/// Something that must not be found.
struct Absence {
    /// Where: beginnings of paths.
    below: &'static [&'static str],
    /// Except there.
    except: &'static [&'static str],
    /// Any of these, compared in lower case.
    words: &'static [&'static str],
    why: &'static str,
}

const ABSENCES: [Absence; 4] = [
    Absence {
        below: &["crates/headwater-job/src/"],
        except: &[],
        words: &["qcow2", "vmdk", "vhdx", "headwater_image"],
        why: "a job works on nodes and never names a format",
    },
    Absence {
        below: &["crates/headwater-block/src/", "crates/headwater-image/src/", "crates/headwater-job/src/"],
        except: &["crates/headwater-block/src/clock.rs"],
        words: &["tokio::spawn", "spawn_local", "tokio::time", "tokio::net", "tokio::fs"],
        why: "below an export time comes from Clock, concurrency from futures, I/O from nodes: it must run in the simulator",
    },
    Absence {
        below: &["crates/", "fuzz/", "xtask/"],
        except: &[
            "crates/headwater-block/src/buffer",
            "crates/headwater-storage/src/file",
            "crates/headwater-sandbox/src/sys.rs",
            "crates/headwater-ublk/src/control.rs",
            "crates/headwater-ublk/src/descriptors.rs",
            "crates/headwater-ublk/src/queue.rs",
            "crates/headwater-fuse/src/memory.rs",
            "crates/headwater-fuse/src/ring.rs",
            "xtask/src/tidy/absences.rs",
        ],
        words: &["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "allow(unsafe_code)"],
        why: "unsafe code belongs to the buffers, the file engine, the sandbox's system calls and the rings of ublk and FUSE only",
    },
    Absence {
        below: &["crates/headwater-nbd/src/", "crates/headwater-qmp/src/"],
        except: &[],
        words: &["tcpstream", "unixstream", "udpsocket", "std::io::", "tokio::", "std::fs"],
        why: "the codec takes bytes and gives bytes; it does no I/O",
    },
];

pub(crate) fn check(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && !file.is_test()) {
        let begins = |list: &[&str]| list.iter().any(|start| file.path.starts_with(start));
        let rules: Vec<_> = ABSENCES.iter().filter(|a| begins(a.below) && !begins(a.except)).collect();
        for (number, line) in file.code_lines() {
            let line = line.to_ascii_lowercase();
            for absence in &rules {
                for word in absence.words.iter().filter(|word| line.contains(**word)) {
                    problems.push(format!("{}:{number}: `{word}` here; {}", file.path, absence.why));
                }
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        check(&[File { path: path.into(), text: text.into() }]).len()
    }

    #[test]
    fn code_is_held_to_them_and_comments_and_tests_are_not() {
        assert_eq!(problems("crates/headwater-job/src/stream.rs", "use x::Qcow2;\n"), 1);
        assert_eq!(problems("crates/headwater-job/src/stream.rs", "// as qcow2 does\n"), 0);
        assert_eq!(problems("crates/headwater-job/src/stream/tests.rs", "use x::Qcow2;\n"), 0);
        assert_eq!(
            problems("crates/headwater-job/src/a.rs", "fn f() {}\nmod tests {\n use x::Qcow2;\n}\n"),
            0
        );
        assert_eq!(problems("crates/headwater-image/src/a.rs", "    unsafe { f() }\n"), 1);
        assert_eq!(problems("crates/headwater-storage/src/file/uring.rs", "    unsafe { f() }\n"), 0);
    }
}
