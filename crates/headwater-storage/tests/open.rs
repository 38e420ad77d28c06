//! Which names open what.

mod support;

use headwater_block::{Error, ErrorKind};
use headwater_storage::file::{Engine, IoMode};
use headwater_storage::open::{OpenOptions, open_protocol};
use support::http::{Answer, HttpServer, proper};
use support::{Server, pattern, read, run};

#[test]
fn each_scheme_opens_its_node() {
    run(async {
        let options = OpenOptions::new(Engine::new(IoMode::Auto).unwrap()).read_only(true);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pattern(0, 1 << 20)).unwrap();
        let path = file.path().to_str().unwrap();
        let nbd = Server::nbdkit(&["pattern", "1M"]);
        let http = HttpServer::start(|asked| Answer::Send(proper(asked, 1 << 20, ""))).await;
        for (name, driver) in [
            (path.to_owned(), "file"),
            (format!("file:{path}"), "file"),
            (format!("file://{path}"), "file"),
            (nbd.uri(), "nbd"),
            (http.url("/disk.img"), "http"),
        ] {
            let node = open_protocol(&name, &options).await.unwrap();
            assert_eq!((node.driver(), node.size(), node.is_read_only()), (driver, 1 << 20, true), "{name}");
            assert_eq!(read(&*node, 4097, 5000).await.unwrap(), pattern(4097, 5000), "{name}");
            node.close().await.unwrap();
        }
    });
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    run(async {
        let options = OpenOptions::new(Engine::new(IoMode::Auto).unwrap());
        let open = async |name: &str| -> Error {
            match open_protocol(name, &options).await {
                Ok(_) => panic!("{name} was opened"),
                Err(error) => error,
            }
        };
        for name in ["ssh://host/disk", "rbd://pool/image", "json:{\"driver\":\"raw\"}", "nbd:host:10809"] {
            let error = open(name).await;
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains("nbd+unix://"), "{error}");
        }
        for name in ["", "file:", "file://host/path", "http://", "nbd+unix:///x", "nbds://h"] {
            let error = open(name).await;
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{name}: {error}");
        }
        for name in ["/nowhere/a", "./ssh://host/disk", "odd:name"] {
            assert_eq!(open(name).await.kind(), ErrorKind::NotFound, "{name}");
        }
    });
}
