//! Where a server listens.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use crate::common::{Client, Server, in_runtime};
use crate::protocol::read;
use headwater_block::ErrorKind;
use headwater_export::Listen;
use headwater_export::nbd::{NbdServer, ServerOptions};
use headwater_nbd::{ClientAsk, IpFamily, NbdAddress};

fn start(listen: Listen) -> Server {
    Server::start_at(tempfile::tempdir().unwrap(), listen, ServerOptions::default())
}

/// Why `listen` can't be had.
fn refusal(listen: Listen) -> ErrorKind {
    let mut kind = None;
    in_runtime(async {
        kind = Some(NbdServer::start(listen, ServerOptions::default()).err().expect("it is refused").kind());
    });
    kind.unwrap()
}

fn inet(host: &str, port: u16, to: Option<u16>) -> Listen {
    Listen::Inet { host: host.to_owned(), port, to, family: IpFamily::V4 }
}

fn port(server: &Server) -> u16 {
    let NbdAddress::Tcp { port, .. } = server.address else { panic!("{:?}", server.address) };
    port
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let unix = |path: &Path| Listen::Unix { path: path.to_owned() };
    let server = Server::start_at(directory, unix(&path), ServerOptions::default());
    server.client();
    assert_eq!(refusal(unix(&path)), ErrorKind::InUse);
    server.client();
    let file = server.path("file");
    std::fs::write(&file, b"precious").unwrap();
    assert_eq!(refusal(unix(&file)), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert_eq!(refusal(unix(&server.path("no/such/directory.sock"))), ErrorKind::NotFound);
}

#[test]
fn of_a_range_of_ports_the_first_free_one_is_taken() {
    let first = start(inet("127.0.0.1", 0, None));
    let taken = port(&first);
    assert_eq!(refusal(inet("127.0.0.1", taken, None)), ErrorKind::InUse);
    assert_eq!(refusal(inet("127.0.0.1", taken, Some(taken))), ErrorKind::InUse);
    assert_eq!(refusal(inet("127.0.0.1", taken, Some(taken - 1))), ErrorKind::InvalidInput);
    let next = start(inet("127.0.0.1", taken, Some(taken + 20)));
    assert!((taken + 1..=taken + 20).contains(&port(&next)), "{}", port(&next));
}

#[test]
fn without_a_host_all_addresses_are_served() {
    let listen = Listen::Inet { host: String::new(), port: 0, to: None, family: IpFamily::Any };
    let server = start(listen);
    TcpStream::connect(("127.0.0.1", port(&server))).unwrap();
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        TcpStream::connect(("::1", port(&server))).unwrap();
    }
    let listen = Listen::Inet { host: "127.0.0.1".into(), port: 0, to: None, family: IpFamily::V6 };
    assert_eq!(refusal(listen), ErrorKind::InvalidInput);
}

#[test]
fn an_abstract_socket_has_a_name_and_no_file() {
    for tight in [true, false] {
        let name = format!("headwater-test-{}-{tight}", std::process::id()).into_bytes();
        let server = start(Listen::Abstract { name: name.clone(), tight });
        let mut wire_name = name.clone();
        if !tight {
            wire_name.resize(107, 0);
        }
        let address = SocketAddr::from_abstract_name(wire_name).unwrap();
        let stream = UnixStream::connect_addr(&address).unwrap();
        let mut client = Client::negotiate(stream, ClientAsk::new("disk"));
        assert_eq!(client.ask(read(1, 0, 4096), &[]).holes, [(0, 4096)]);
        assert_eq!(refusal(Listen::Abstract { name, tight }), ErrorKind::InUse);
        drop(server);
    }
    assert_eq!(refusal(Listen::Abstract { name: vec![b'x'; 200], tight: true }), ErrorKind::InvalidInput);
}

#[test]
fn a_listening_descriptor_is_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("handed-over.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = start(Listen::Fd(OwnedFd::from(listener)));
    Client::negotiate(UnixStream::connect(&path).unwrap(), ClientAsk::new("disk"));
    drop(server);
    assert!(path.exists(), "it was made by somebody else");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = start(Listen::Fd(OwnedFd::from(listener)));
    assert_eq!(port(&server), address.port());
    TcpStream::connect(address).unwrap();

    let (connected, _other) = UnixStream::pair().unwrap();
    assert_eq!(refusal(Listen::Fd(connected.into())), ErrorKind::InvalidInput);
    let file = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(refusal(Listen::Fd(file.into())), ErrorKind::InvalidInput);
}
