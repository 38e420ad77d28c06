//! Tests of NBD addresses.

use proptest::prelude::*;

use super::*;

fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
    NbdUri::new(NbdAddress::Tcp { host: host.to_owned(), port }, export)
}

fn unix(path: &str, export: &str) -> NbdUri {
    NbdUri::new(NbdAddress::Unix { path: path.into() }, export)
}

fn over_tls(uri: NbdUri, certificates: &str, hostname: Option<&str>, verify_peer: bool) -> NbdUri {
    let (directory, hostname) = (certificates.into(), hostname.map(str::to_owned));
    NbdUri { tls: Some(UriTls::Certificates { directory, hostname, verify_peer }), ..uri }
}

fn with_keys(uri: NbdUri, keys: &str, user: Option<&str>) -> NbdUri {
    NbdUri { tls: Some(UriTls::Psk { keys: keys.into(), user: user.map(str::to_owned) }), ..uri }
}

#[test]
fn addresses_are_understood() {
    for (text, expected) in [
        ("nbd://example.com", tcp("example.com", 10809, "")),
        ("nbd://example.com/", tcp("example.com", 10809, "")),
        ("NBD://example.com:/disk", tcp("example.com", 10809, "disk")),
        ("nbd://10.0.0.1:10810/a/b%20c", tcp("10.0.0.1", 10810, "a/b c")),
        ("nbd://[::1]:10810/disk", tcp("::1", 10810, "disk")),
        ("nbd://[fe80::1]/disk", tcp("fe80::1", 10809, "disk")),
        ("nbd://host//absolute", tcp("host", 10809, "/absolute")),
        ("nbd+unix:///?socket=/run/nbd.sock", unix("/run/nbd.sock", "")),
        ("nbd+unix:///disk?socket=/run/a%26b.sock", unix("/run/a&b.sock", "disk")),
        ("nbd+unix:///disk?socket=relative.sock", unix("relative.sock", "disk")),
        ("nbd+unix://?socket=/run/nbd.sock", unix("/run/nbd.sock", "")),
        ("nbds://h/d?tls-certificates=/pki", over_tls(tcp("h", 10809, "d"), "/pki", None, true)),
        (
            "nbds+unix:///d?tls-verify-peer=false&socket=s&tls-hostname=h&tls-certificates=a%20b",
            over_tls(unix("s", "d"), "a b", Some("h"), false),
        ),
        ("nbds://al%40x@h/d?tls-psk-file=/k", with_keys(tcp("h", 10809, "d"), "/k", Some("al@x"))),
        ("nbds://[::1]/?tls-psk-file=k", with_keys(tcp("::1", 10809, ""), "k", None)),
        ("nbds+unix://alice@/d?tls-psk-file=k&socket=s", with_keys(unix("s", "d"), "k", Some("alice"))),
    ] {
        assert_eq!(text.parse(), Ok(expected), "{text}");
        assert!(NbdUri::is_nbd(text), "{text}");
    }
}

#[test]
fn mistakes_are_explained() {
    for (text, words) in [
        ("disk.qcow2", "expected nbd://"),
        ("http://host/", "unknown scheme http"),
        ("nbds://host/disk", "TLS needs certificates"),
        ("nbds+unix:///?socket=/s", "TLS needs certificates"),
        ("nbds+unix:///?tls-certificates=/c", "socket is missing"),
        ("nbd://host/?tls-certificates=/c", "belongs to nbds"),
        ("nbds://host/?tls-certificates=", "needs a directory"),
        ("nbds://host/?tls-certificates=/c&tls-certificates=/d", "twice"),
        ("nbds://host/?tls-certificates=/c&tls-verify-peer=maybe", "true or false"),
        ("nbds://host/?tls-certificates=/c&tls-hostname=", "needs a name"),
        ("nbds+vsock://1/?tls-certificates=/c", "unknown scheme"),
        ("nbd+vsock://1/", "unknown scheme"),
        ("nbd:///disk", "host is missing"),
        ("nbd://:10809/disk", "host is missing"),
        ("nbd://user@host/", "belongs to keys"),
        ("nbds://user@host/?tls-certificates=/c", "belongs to keys"),
        ("nbds://@host/?tls-psk-file=/k", "nothing does"),
        ("nbds://%ff@host/?tls-psk-file=/k", "nothing does"),
        ("nbds://user@/?tls-psk-file=/k", "host is missing"),
        ("nbds+unix://user@host/?socket=/s&tls-psk-file=/k", "takes no host"),
        ("nbds://host/?tls-psk-file=", "needs a file"),
        ("nbd://host/?tls-psk-file=/k", "belongs to nbds"),
        ("nbds://host/?tls-psk-file=/k&tls-certificates=/c", "exclude each other"),
        ("nbds://host/?tls-psk-file=/k&tls-hostname=h", "belong to tls-certificates"),
        ("nbd://host:port/", "not a port number"),
        ("nbd://host:+1/", "not a port number"),
        ("nbd://host:65536/", "not a port number"),
        ("nbd://::1/", "brackets"),
        ("nbd://[::1/", "not closed"),
        ("nbd://[::1]x/", "after the IPv6 address"),
        ("nbd://[host]/", "not an IPv6 address"),
        ("nbd://host/%zz", "hexadecimal"),
        ("nbd://host/%2", "hexadecimal"),
        ("nbd://host/%ff", "UTF-8"),
        ("nbd://host/a#b", "fragment"),
        ("nbd://host/?socket=/s", "belongs to nbd+unix"),
        ("nbd://host/?port=3", "unknown parameter"),
        ("nbd+unix:///disk", "socket is missing"),
        ("nbd+unix:///disk?socket=", "needs the path"),
        ("nbd+unix:///disk?socket=/a%00b", "needs the path"),
        ("nbd+unix:///disk?socket=/a&socket=/b", "twice"),
        ("nbd+unix://host/disk?socket=/a", "takes no host"),
    ] {
        let error = text.parse::<NbdUri>().unwrap_err();
        assert!(error.why.contains(words), "{text}: {error}");
    }
    let long = format!("nbd://host/{}", "x".repeat(4097));
    assert!(long.parse::<NbdUri>().unwrap_err().why.contains("4097 bytes"));
}

#[test]
fn file_names_are_not_nbd() {
    for text in ["disk.qcow2", "/a/nbd", "nbd", "http://nbd/", "nbdx://host/", "C:\\nbd"] {
        assert!(!NbdUri::is_nbd(text), "{text}");
    }
    assert!(
        NbdUri::is_nbd("nbds://host/") && NbdUri::is_nbd("nbds+vsock://1/"),
        "perhaps refused later, with a reason"
    );
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(export: String, path: Vec<u8>, host in "[a-z0-9.-]{1,20}", port in 1_u16.., v6: bool) {
        let host = if v6 { "2001:db8::1".to_owned() } else { host };
        let uri = NbdUri::new(NbdAddress::Tcp { host: host.clone(), port }, export.clone());
        prop_assert_eq!(uri.to_string().parse(), Ok(uri.clone()));
        let path: Vec<u8> = path.into_iter().filter(|byte| *byte != 0).collect();
        prop_assume!(!path.is_empty());
        let path = PathBuf::from(OsString::from_vec(path));
        let tls = if port % 3 == 0 {
            UriTls::Psk { keys: path.clone(), user: v6.then_some(host) }
        } else {
            UriTls::Certificates { directory: path.clone(), hostname: v6.then_some(host), verify_peer: port > 1000 }
        };
        let uri = NbdUri { tls: Some(tls.clone()), ..uri };
        prop_assert_eq!(uri.to_string().parse(), Ok(uri));
        let uri = NbdUri::new(NbdAddress::Unix { path }, export);
        prop_assert_eq!(uri.to_string().parse(), Ok(uri.clone()));
        let uri = NbdUri { tls: Some(tls), ..uri };
        prop_assert_eq!(uri.to_string().parse(), Ok(uri));
    }

    #[test]
    fn any_text_is_judged(text in ".{0,80}") {
        let _ = text.parse::<NbdUri>();
        let _ = format!("nbd://{text}").parse::<NbdUri>();
        let _ = format!("nbd+unix:///{text}").parse::<NbdUri>();
    }
}
