//! `create`, `info`, `map`, `check`, `serve`, `demo` and the generated texts, against qemu-img.

use crate::common::*;
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

#[test]
fn created_images_are_what_qemu_img_would_have_made() {
    let scratch = Scratch::new();
    let base = scratch.path("base.raw");
    make_raw(&base, 3 * MIB, 1);
    let cases: [(&str, &[&str], &str); 10] = [
        ("plain", &[], "1.5G"),
        ("v2", &["-o", "compat=0.10"], "10M"),
        ("small clusters", &["-o", "cluster_size=4K,refcount_bits=1"], "100M"),
        ("subclusters", &["-o", "extended_l2=on,cluster_size=128k"], "64K"),
        ("large", &["-o", "compression_type=zstd,cluster_size=2M"], "1T"),
        ("allocated", &["-o", "preallocation=falloc,cluster_size=4K"], "5M"),
        ("written", &["-o", "preallocation=full,compat=0.10"], "5M"),
        ("lazy", &["-o", "preallocation=metadata,lazy_refcounts=on"], "5G"),
        ("overlay", &["-b", "base.raw", "-F", "raw"], ""),
        ("grown overlay", &["-b", "base.raw", "-F", "raw"], "20M"),
    ];
    for (name, options, size) in cases {
        let (ours, theirs) = (scratch.path("ours.qcow2"), scratch.path("theirs.qcow2"));
        let args = |path: &str| {
            let mut args = vec!["create".to_owned(), "-f".into(), "qcow2".into()];
            args.extend(options.iter().map(|o| (*o).to_owned()));
            args.push(path.into());
            args.extend((!size.is_empty()).then(|| size.to_owned()));
            args
        };
        headwater(&args(&ours)).code(0);
        tool("qemu-img", &args(&theirs));
        assert_sound(&ours);
        let info = |path: &str| {
            let mut info = json(&tool("qemu-img", &["info", "--output=json", path]));
            for volatile in ["filename", "actual-size", "children"] {
                info.as_object_mut().unwrap().remove(volatile);
            }
            info
        };
        assert_eq!(info(&ours), info(&theirs), "{name}");
        tool("qemu-io", &["-c", "write -P 3 0 64k", &ours]);
        assert_sound(&ours);
        std::fs::remove_file(&ours).unwrap();
    }
    let raw = scratch.path("a.raw");
    headwater(&["create", "-f", "raw", &raw, "2G"]).code(0);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 2 << 30);
    assert!(allocated(&raw) < MIB);
}

#[test]
fn a_new_disk_has_the_space_that_was_asked_for() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    for (format, mode, holds) in [
        ("qcow2", "falloc", true),
        ("qcow2", "full", true),
        ("qcow2", "metadata", false),
        ("raw", "falloc", true),
        ("raw", "full", true),
        ("raw", "off", false),
    ] {
        let path = scratch.path(&format!("{mode}.{format}"));
        headwater(&["create", "-f", format, "-o", &format!("preallocation={mode}"), &path, "6M"]).code(0);
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.len() >= 6 * MIB, "{mode}.{format}: {} bytes", metadata.len());
        assert_eq!(
            metadata.blocks() * 512 >= 6 * MIB,
            holds,
            "{mode}.{format}: {} blocks",
            metadata.blocks()
        );
    }
    let (image, data) = (scratch.path("meta.qcow2"), scratch.path("disk.raw"));
    make_raw(&data, 2 * MIB, 3);
    // QEMU's tools look for it in their own working directory.
    headwater(&["create", "-o", &format!("data_file={data},data_file_raw=on"), &image, "2M"]).code(0);
    assert_sound(&image);
    tool("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", &image, &data]);
}

#[test]
fn creating_refuses_what_cannot_be() {
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    headwater(&["create", &image]).code(1).says(&["size"]);
    headwater(&["create", "-o", "cluster_size=3K", &image, "1M"]).code(1).says(&["cluster"]);
    headwater(&["create", "-o", "flavour=sweet", &image, "1M"]).code(1).says(&["flavour"]);
    headwater(&["create", "-b", "gone.raw", "-F", "raw", &image]).code(1).says(&["gone.raw"]);
    assert!(!std::path::Path::new(&image).exists());
    headwater(&["create", &image, "1M"]).code(0);
    headwater(&["create", &image, "1M"]).code(1).says(&["a.qcow2", "exists"]);
}

#[test]
fn info_says_what_qemu_img_says() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base.qcow2"), scratch.path("top.qcow2"));
    tool("qemu-img", &["create", "-qf", "qcow2", &base, "10M"]);
    tool("qemu-img", &["snapshot", "-c", "before", &base]);
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top, "1G"]);
    let ours = json(&headwater(&["info", "--json", &top]).code(0).stdout);
    let theirs = json(&tool("qemu-img", &["info", "--output=json", &top]));
    for field in
        ["filename", "format", "virtual-size", "backing-filename", "backing-filename-format", "cluster-size"]
    {
        assert_eq!(ours[field], theirs[field], "{field}: {ours:#}");
    }
    let chain = json(&headwater(&["info", "--json", "--backing-chain", &top]).code(0).stdout);
    let layers = chain.as_array().expect("an array of layers");
    assert_eq!(layers.len(), 2);
    assert_eq!(layers[1]["virtual-size"], 10 * MIB);
    let text = headwater(&["info", &base]).code(0).stdout;
    for word in ["base.qcow2", "qcow2", "10 MiB", "before"] {
        assert!(text.contains(word), "{text}");
    }
    headwater(&["info", &scratch.path("none")]).code(1).says(&["none"]);
}

#[test]
fn maps_agree_with_qemu_img() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base.qcow2"), scratch.path("top.qcow2"));
    tool("qemu-img", &["create", "-qf", "qcow2", &base, "8M"]);
    tool("qemu-io", &["-c", "write -P 1 0 2M", "-c", "write -z 3M 1M", &base]);
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top, "10M"]);
    tool("qemu-io", &["-c", "write -P 2 1M 64k", "-c", "write -z 4M 1M", "-c", "write -P 3 9M 1M", &top]);
    let ours = json(&headwater(&["map", "--json", &top]).code(0).stdout);
    let theirs = json(&tool("qemu-img", &["map", "--output=json", &top]));
    let bytes = |map: &Value, field: &str| {
        let mut all = Vec::new();
        for extent in map.as_array().unwrap() {
            let start = extent["start"].as_u64().unwrap();
            let len = extent["length"].as_u64().unwrap();
            assert!(start.is_multiple_of(65536) && len.is_multiple_of(65536));
            all.extend(std::iter::repeat_n(extent[field].clone(), (len / 65536) as usize));
        }
        all
    };
    for field in ["data", "zero", "depth", "present"] {
        assert_eq!(bytes(&ours, field), bytes(&theirs, field), "{field}\n{ours}\n{theirs}");
    }
    let text = headwater(&["map", &top]).code(0).stdout;
    assert!(text.contains("top.qcow2") && text.contains("base.qcow2"), "{text}");
}

#[test]
fn check_finds_and_repairs_what_qemu_img_finds() {
    use std::os::unix::fs::FileExt;
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    tool("qemu-img", &["create", "-qf", "qcow2", &image, "4M"]);
    tool("qemu-io", &["-c", "write -P 1 0 1M", &image]);
    headwater(&["check", &image]).code(0);
    let good = read_file(&image);
    let table = u64::from_be_bytes(good[48..56].try_into().unwrap());
    let block = u64::from_be_bytes(good[table as usize..table as usize + 8].try_into().unwrap());
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    // A cluster at the end that nothing refers to.
    let clusters = (good.len() as u64).div_ceil(65536);
    file.set_len((clusters + 1) * 65536).unwrap();
    file.write_all_at(&1u16.to_be_bytes(), block + clusters * 2).unwrap();
    let report = headwater(&["check", "--json", &image]).code(3);
    assert_eq!(json(&report.stdout)["leaks"], 1, "{}", report.stdout);
    headwater(&["check", "--repair", "leaks", &image]).code(0);
    assert_sound(&image);
    // A data cluster whose refcount says that it is free.
    std::fs::write(&image, &good).unwrap();
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap());
    let l2 =
        u64::from_be_bytes(good[l1 as usize..l1 as usize + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    let data =
        u64::from_be_bytes(good[l2 as usize..l2 as usize + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&0u16.to_be_bytes(), block + data / 65536 * 2).unwrap();
    let report = headwater(&["check", "--json", &image]).code(2);
    assert!(json(&report.stdout)["corruptions"].as_u64() > Some(0), "{}", report.stdout);
    headwater(&["check", "--repair", "all", &image]).code(0);
    assert_sound(&image);
    let raw = scratch.path("a.raw");
    make_raw(&raw, MIB, 1);
    headwater(&["check", &raw]).code(63);
    headwater(&["check", &scratch.path("none")]).code(1).says(&["none"]);
}

#[test]
fn an_image_is_served_as_it_is() {
    let scratch = Scratch::new();
    let (raw, image) = (scratch.path("a.raw"), scratch.path("a.qcow2"));
    make_raw(&raw, 8 * MIB, 1);
    to_qcow2(&raw, &image);
    let uri = scratch.uri("disk");
    let mut running = Running::start(&["serve", &image, "--serve", &uri]);
    running.wait_for_socket(&scratch.path("disk.sock"));
    tool("qemu-img", &["compare", &uri, &raw]);
    let info = json(&tool("nbdinfo", &["--json", &uri]));
    assert_eq!(info["exports"][0]["is_read_only"], false, "{info}");
    assert_eq!(info["exports"][0]["can_multi_conn"], true, "{info}");
    nbdsh(&uri, "h.pwrite(b'new' * 100, 4711)\nh.flush()\nh.shutdown()");
    running.signal("TERM");
    running.wait().code(0);
    assert_sound(&image);
    let mut running = Running::start(&["serve", &image, "--format", "qcow2", "--read-only", "--serve", &uri]);
    running.wait_for_socket(&scratch.path("disk.sock"));
    nbdsh(&uri, "assert h.is_read_only()\nassert h.pread(300, 4711) == b'new' * 100");
    running.signal("INT");
    running.wait().code(0);
}

#[test]
fn what_is_read_through_a_copying_server_stays() {
    let scratch = Scratch::new();
    let (raw, image) = (scratch.path("a.raw"), scratch.path("a.qcow2"));
    make_raw(&raw, 8 * MIB, 1);
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", "a.raw", "-F", "raw", &image]);
    let uri = scratch.uri("disk");
    let mut running = Running::start(&["serve", &image, "--copy-on-read", "--serve", &uri]);
    running.wait_for_socket(&scratch.path("disk.sock"));
    nbdsh(&uri, "h.pread(512, 100000)\nh.shutdown()");
    running.signal("TERM");
    running.wait().code(0);
    assert_sound(&image);
    let map = json(&tool("qemu-img", &["map", "--output=json", &image]));
    let local =
        map.as_array().unwrap().iter().filter(|e| e["depth"] == 0).map(|e| e["length"].as_u64().unwrap());
    assert_eq!(local.sum::<u64>(), 65536, "{map}");
}

#[test]
fn the_demonstration_proves_itself() {
    let before: Vec<_> = leftovers();
    let ended = headwater(&["demo", "--size", "24M", "--latency", "5"]).code(0);
    for word in ["byte for byte", "guest", "times"] {
        assert!(ended.stdout.contains(word), "{}", ended.stdout);
    }
    assert_eq!(leftovers().len(), before.len(), "something was left behind");
}

fn leftovers() -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    entries.map(|e| e.path()).filter(|p| p.to_string_lossy().contains("headwater-demo")).collect()
}

#[test]
fn manuals_and_completions_are_generated() {
    let scratch = Scratch::new();
    let dir = scratch.path("man");
    headwater(&["man", &dir]).code(0);
    let page = String::from_utf8(read_file(&format!("{dir}/headwater-stream.1"))).unwrap();
    for word in ["SOURCE", "exit\\-when\\-done", ".TH"] {
        assert!(page.contains(word), "{word} is not in the manual of stream");
    }
    assert!(headwater(&["man"]).code(0).stdout.contains(".TH headwater"));
    for shell in ["bash", "zsh", "fish"] {
        let script = headwater(&["completions", shell]).code(0).stdout;
        assert!(script.contains("exit-when-done"), "{shell}");
    }
}

/// As systemd's socket units start a service: the socket is there before the program is.
#[test]
fn a_socket_that_was_handed_over_is_served() {
    let scratch = Scratch::new();
    let (raw, socket) = (scratch.path("disk.raw"), scratch.path("disk.sock"));
    make_raw(&raw, MIB, 1);
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let served = |pid: &str| {
        let script = format!("export LISTEN_PID={pid} LISTEN_FDS=1; exec \"$@\" 3<&0 </dev/null");
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_headwater")]);
        command.args(["serve", &raw, "--format", "raw", "--serve", "nbd+fd:///disk"]);
        command.stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()));
        command.stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let mut server = served("$$");
    // It may come before the server does.
    let size = tool("nbdinfo", &["--size", &format!("nbd+unix:///disk?socket={socket}")]);
    assert_eq!(size.trim(), MIB.to_string());
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), rustix::process::Signal::INT)
        .unwrap();
    assert!(server.wait().unwrap().success());
    // The socket is the service manager's, and stays.
    assert!(std::path::Path::new(&socket).exists());
    let refused = served("1").wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("no socket was handed over"), "{said}");
}
