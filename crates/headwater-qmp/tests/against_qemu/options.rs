//! Options that are wrong are refused with the same text.

use std::process::{Command, Stdio};

use headwater_qmp::option::{self, OptionKind, Parsed};
use headwater_qmp::{QmpError, opts};

use crate::daemon::PROGRAM;

/// What QEMU says of an option that it refuses, without its name and the option.
fn their_error(flag: &str, text: &str) -> String {
    let output = Command::new(PROGRAM)
        .args([flag, text])
        .stdin(Stdio::null())
        .output()
        .expect("qemu-storage-daemon is installed");
    assert!(!output.status.success(), "they accept {flag} {text}");
    let errors = String::from_utf8(output.stderr).expect("UTF-8");
    let start = format!("{PROGRAM}: {flag} {text}: ");
    // Before the error there may be warnings, and after it hints.
    let lines: Vec<&str> = errors.lines().filter_map(|line| line.strip_prefix(start.as_str())).collect();
    let error = lines.iter().find(|line| !line.starts_with("warning: "));
    (*error.unwrap_or_else(|| panic!("no error of {flag} {text} in {errors:?}"))).to_owned()
}

fn compare(flag: &str, text: &str, ours: Result<impl std::fmt::Debug, QmpError>) {
    match ours {
        Ok(value) => panic!("we take {flag} {text} for {value:?}, they say {}", their_error(flag, text)),
        Err(error) => assert_eq!(error.desc, their_error(flag, text), "{flag} {text}"),
    }
}

fn check(flag: &str, kind: OptionKind, texts: &[&str]) {
    for text in texts {
        compare(flag, text, option::parse(kind, text));
    }
}

#[test]
fn blockdev_syntax() {
    let long = "k".repeat(128);
    let texts = [
        "",
        "null-co,size",
        "null-co,,",
        "null-co,=x",
        "=x",
        "null-co,1=2",
        "0=1",
        "null-co,a..b=1",
        "null-co,.a=1",
        "null-co,a.=1",
        "null-co,_a=1",
        "null-co,a%=1",
        "null-co,a b=1",
        "null-co,é=1",
        "null-co,a.-b=1",
        "null-co,a.0x=1",
        "null-co,a_b=1",
        "null-co,__org.foo_a=1",
        "null-co,__a=1",
        "null-co,__a.b_c.d=1",
        "null-co,__a.b_c.1=1",
        "null-co,a=1,a.b=2",
        "null-co,a.b=1,a=2",
        "null-co,a.b.c=1,a.b=2",
        "null-co,a.b=1,a.b.c=2",
        "null-co,a.0=1,a.x=2",
        "null-co,a.x=1,a.0=2",
        "null-co,a.b.0=1,a.b.c=2",
        "null-co,a.0=1,a.2=2",
        "null-co,a.1=1",
        "null-co,a.00=1",
        "null-co,a.0=1,a.00=1",
        "null-co,a.99999999999999999999999=1",
        "null-co,a.0.0=1",
        "null-co,a.b",
        "null-co,a.0b",
        "node-name=x,null-co",
        "driver",
        "driver=",
        "helper",
        "help",
        "help,x=1",
        "null-co,help",
        "null-co,a=1,help",
        "null-co,?x",
        "null-co,help=on",
        "null-co,driver=file",
        "a.b.c.1=1,driver=null-co",
        "driver.x=1",
        "driver.0=1",
        &format!("null-co,{}=1", &long[..127]),
        &format!("null-co,{long}=1"),
        &format!("null-co,a.{long}=1"),
        &format!("null-co,{long}.a=1"),
        &format!("null-co,{}.{}=1", &long[..70], &long[..70]),
    ];
    check("--blockdev", OptionKind::Blockdev, &texts);
}

#[test]
fn blockdev_values() {
    let texts = [
        "null-co,size=",
        "null-co,size=1x",
        "null-co,size=1.5M",
        "null-co,size=1k",
        "null-co,size=0x",
        "null-co,size=08",
        "null-co,size=--1",
        "null-co,size=0x-1",
        "null-co,size=+1,zz=1",
        "null-co,size= 1,zz=1",
        "null-co,size=\u{b}1,zz=1",
        "null-co,size=010,zz=1",
        "null-co,size=0x1F,zz=1",
        "null-co,size=1 ,zz=1",
        "null-co,size=9223372036854775807,zz=1",
        "null-co,size=9223372036854775808",
        "null-co,size=-9223372036854775808,zz=1",
        "null-co,size=-9223372036854775809",
        "null-co,size.x=1",
        "null-co,size.0=1",
        "null-co,latency-ns=1k",
        "null-co,latency-ns=0x10,zz=1",
        "null-co,latency-ns=18446744073709551615,zz=1",
        "null-co,latency-ns=18446744073709551616",
        "null-co,latency-ns=-1,zz=1",
        "null-co,read-zeroes=maybe",
        "null-co,read-zeroes=",
        "null-co,read-zeroes=ON",
        "null-co,read-zeroes=1",
        "null-co,read-zeroes=on,zz=1",
        "null-co,read-zeroes=yes,zz=1",
        "null-co,read-zeroes=true,zz=1",
        "null-co,read-zeroes=y,zz=1",
        "null-co,read-zeroes=off,zz=1",
        "null-co,read-zeroes=no,zz=1",
        "null-co,read-zeroes=false,zz=1",
        "null-co,read-zeroes=n,zz=1",
        "null-co,read-zeroes.a=on",
        "null-co,node-name.x=1",
        "null-co,foo=1",
        "null-co,foo.0=1",
        "raw,foo.bar=1",
        "raw,file.driver=file",
        "raw,file.driver=bogus",
        "raw,file.x=1",
        "raw,file.driver=file,file.filename=x,file.z=1",
        "raw,file.driver=file,file.filename=x,file.z.y=1",
        "raw,file.0=1",
        "raw,file.driver=file,file.filename=x,file.cache=5",
        "raw,file.driver=file,file.filename.x=1",
        "raw,file.driver=file,file.filename=x,file.read-only=maybe",
        "raw,file.driver=file,file.filename=x,file.cache.direct=5",
        "raw,file.driver=file,file.filename=x,file.cache.direct.x=5",
        "raw,file.driver=file,file.filename=x,file.cache.0=5",
        "raw,file.driver=file,file.filename=x,file.locking=q",
        "raw,file=a,,b,zz=1",
        "qcow2,file=x,backing=null,zz=1",
        "qcow2,file=x,backing.driver=foo",
        "qcow2,file=x,backing.0=foo",
        "qcow2,file=x,overlap-check=q",
        "qcow2,file=x,overlap-check.template=q",
        "qcow2,file=x,overlap-check.main-header=q",
        "qcow2,file=x,overlap-check.0=q",
        "qcow2,file=x,encrypt.format=luks,encrypt.x=1",
        "qcow2,file=x,encrypt=luks",
        "blkdebug,image=x,inject-error.0.event=none,inject-error.0.errno=1k",
        "blkdebug,image=x,inject-error.0=none",
        "blkdebug,image=x,inject-error=none",
        "blkdebug,image=x,inject-error.event=none",
        "blkdebug,image=x,inject-error.0.event=q",
        "blkdebug,image=x,inject-error.0.event=none,inject-error.0.q=1",
        "blkdebug,image=x,inject-error.0.errno=1",
        "blkdebug,image=x,take-child-perms.0=q",
        "blkdebug,image=x,take-child-perms.0.x=q",
        "blkdebug,image=x,take-child-perms=write",
        "blkdebug,image=x,inject-error.0.event=none,inject-error.1=x",
        "nbd,server=x",
        "nbd,server.type=q",
        "nbd,server.host=q",
        "nbd,server.type=unix",
        "nbd,server.type=inet,server.host=a,server.port=1,server.to=65536",
        "nbd,server.type=inet,server.host=a,server.port=1,server.to=-1",
        "nbd,server.type=inet,server.host=a,server.port=1,server.to=x",
        "nbd,server.type=unix,server.path=x,open-timeout=-1",
        "nbd,server.type=unix,server.path=x,open-timeout=-18446744073709551615,zz=1",
    ];
    check("--blockdev", OptionKind::Blockdev, &texts);
}

#[test]
fn blockdev_as_json() {
    let texts = [
        "{",
        "{\"driver\"",
        "{\"dr",
        "{\"driver\":tr",
        "{\"driver\":1",
        "{\"driver\":1.",
        "{]",
        "{]}",
        "{}",
        "{} ",
        "{}}",
        "{} {}",
        "{} x",
        "{} *",
        "{} {",
        "{foo}",
        "{\"a\":*}",
        "{\"a\":%d}",
        "{\"a\":\"\u{1}",
        "[]",
        " {}",
        "{\"driver\":\"null-co\",\"foo\":1}",
        "{\"driver\":\"null-co\",\"size\":\"1M\"}",
        "{'driver':'raw','file':{'driver':'file'}}",
        "{'driver':'raw','file':1}",
    ];
    check("--blockdev", OptionKind::Blockdev, &texts);
}

#[test]
fn other_options() {
    let export = [
        "",
        "nbd",
        "foo",
        "id=a",
        "nbd,id=a,node-name=x,writable=q",
        "{\"type\":\"nbd\"}",
        "type=nbd,id=a,node-name=x,bitmaps.0.node=x",
        "type=nbd,id=a,node-name=x,bitmaps=x",
        "type=nbd,id=a,node-name=x,bitmap=x",
        "help",
        "nbd,help",
        "type=nbd,name.x=q",
    ];
    let sizes = [
        "q",
        "4k,zz=1",
        "-1",
        "16E",
        "1.5",
        "18446744073709551616",
        "",
        "0x10,zz=1",
        " 1,zz=1",
        "1.5k,zz=1",
        ".5k,zz=1",
        "1.k,zz=1",
        "+1,zz=1",
        "1e3",
        "1B,zz=1",
        "1 k",
        "-0",
        "-",
        "0x1k",
        "010,zz=1",
        "1.5e3k",
        "0.1",
        "1.0,zz=1",
        "1e,zz=1",
        "1e1",
        "nan",
        "inf",
    ];
    for size in sizes {
        let text =
            format!("vhost-user-blk,id=a,node-name=x,addr.type=fd,addr.str=1,logical-block-size={size}");
        check("--export", OptionKind::Export, &[&text]);
    }
    check("--export", OptionKind::Export, &export);
    let server = [
        "",
        "addr.type=unix,addr.path=x,foo=1",
        "addr.type=unix",
        "x",
        "x=",
        "addr.type=inet,addr.host=a",
        "addr.type=unix,addr.path=x,max-connections=q",
        "addr.type=unix,addr.path=x,max-connections=4294967296",
        "help",
        "addr=x",
        "addr.type=q",
        "{\"addr\":{\"type\":\"unix\",\"path\":1}}",
        "{\"addr\":{\"type\":\"unix\",\"data\":{\"path\":\"x\"}}}",
        "handshake-max-seconds=x",
        "tls-creds.x=1",
        "tls-creds=x",
        "tls-authz=x,max-connections=x",
        "handshake-max-seconds=x,max-connections=x",
        "max-connections=1,handshake-max-seconds=-1",
    ];
    check("--nbd-server", OptionKind::NbdServer, &server);
    let object = [
        "",
        "foo",
        "iothread",
        "id=x",
        "qom-type=help",
        "iothread,help,foo",
        "iothread,id=a,poll-max-ns=q",
        "iothread,id=a,foo=1",
        "{\"qom-type\":\"iothread\"}",
        "throttle-group,id=a,limits.iops-total=x",
        "throttle-group,id=a,x-iops-total=x",
        "throttle-group,id=a,limits=x",
        "secret,id=a,format=q",
        "tls-creds-x509,id=a,endpoint=q",
        "iothread,id=a,poll-grow=1k",
    ];
    check("--object", OptionKind::Object, &object);
    let monitor = [
        "",
        "chardev=x,mode=foo",
        "chardev=x,pretty=q",
        "x,pretty",
        "x,foo=1",
        "id=a",
        "{\"chardev\":1}",
        "help",
        "pretty=on",
        "pretty=q",
        "mode=q",
        "id.a=q,mode=x",
        "mode=control,pretty=q",
        "mode=x,pretty=q",
        "{\"mode\":1,\"id\":1}",
    ];
    check("--monitor", OptionKind::Monitor, &monitor);
}

#[test]
fn chardev() {
    let texts = [
        "",
        "socket",
        "foo,id=a",
        "id=a",
        "socket,id=b,path=y,server=q",
        "socket,id=b,path=y,server=on,wait=q",
        "socket,id=b,path=y,foo=1",
        "socket,id=b,path=y,foo",
        "socket,id=b,path=y,nofoo",
        "socket,id=1b,path=y",
        "null,=x,id=q",
        "null,,x,id=q",
        "null,id=q,,",
        "socket,id=a,host=h",
        "socket,id=a,path=x,host=y",
        "socket,id=a,path=x,fd=3",
        "socket,id=a,path=x,reconnect=q",
        "socket,id=a,path=x,reconnect=1k",
        "stdio,id=a,signal=q",
        "stdio",
        "file,id=a",
        "file,id=a,path=f,append=q",
        "pipe,id=a",
        "socket,id=a,path=x,telnet=q",
        "socket,id=a,path=x,server=",
        "null,id=q,mux=q",
        "null,id=q,logfile=l,logappend=q",
        "null id=q",
        "null,id=",
        "null,nohelp,id=z",
        "null,id=a,width=x",
        "socket,id=a,path=x,abstract=q",
        "socket,id=a,path=x,tight=q",
        "socket,id=a,host=x,port=0,to=q",
        "socket,id=a,path=x,reconnect-ms=q",
        "nohelp",
        "null,id=a,size=x",
        "null,id=a,size=-1",
        "null,id=a,size=16E",
        "null,id=a,size=0x10k",
        "null,id=a,size=",
        "null,id=a,width=18446744073709551616",
        "null,id=a,width=-1,x=1",
        "null,id=a,width=,x=1",
        "null,id=a,width= 1,x=1",
        "null,id=a,size=1.5k,x=1",
        "null,id=a,size=1.5,x=1",
        "null,id=a,size=1Z",
        "null,id=a,size=1kB",
        "null,id=a,size=1b,x=1",
        "null,id=a,size=.5k,x=1",
        "null,id=a,size=1.k,x=1",
        "null,id=a,size=010,x=1",
        "null,id=a,size=1e3",
        "null,id=a,size=0x1F,x=1",
        "null,id=a,size= 1,x=1",
        "null,id=a,size=+1,x=1",
        "null,id=a,size=18446744073709551615,x=1",
        "null,id=a,size=inf",
        "null,id=a,size=1e,x=1",
        "null,id=a,size=-5k",
        "null,id=a,size=-",
        "null,id=a,size=-0",
        "null,id=a,size=0x",
        "null,id=a,size=.",
        "null,id=a,size=99999999999999999999",
        "null,id=a,width=-99999999999999999999",
        "null,id=a,width=0x",
        "null,id=a,width=-",
        "null,id=a,size=15.9E,x=1",
        "null,id=a,size=18446744073709551616",
    ];
    for text in texts {
        compare("--chardev", text, opts::parse_chardev(text));
    }
}

#[test]
fn trace() {
    for text in ["x=1", "foo,bar", "foo,=1", "foo,events"] {
        if text == "foo,events" {
            let trace = opts::parse_trace(text).expect("a switch has the value \"on\"");
            assert_eq!(trace.events.as_deref(), Some("on"));
            continue;
        }
        compare("--trace", text, opts::parse_trace(text));
    }
}

#[test]
fn help_of_objects() {
    for text in ["help", "foo,help", "iothread,help", "?,id=x"] {
        assert!(matches!(option::parse(OptionKind::Object, text), Ok(Parsed::Help(_))), "{text}");
    }
}
