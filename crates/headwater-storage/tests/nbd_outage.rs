//! What becomes of requests that wait for an NBD server which is away, when somebody says that they needn't.

mod support;

use headwater_block::{Abort, Buffer, Disk, DiskOptions, ErrorKind, Node, TokioClock, WriteFlags};
use headwater_storage::nbd::{NbdNode, NbdOptions};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;
use support::{Server, read, run};

const CLUSTER: u64 = 64 << 10;

/// Nobody here waits as long as the node would.
const DELAY: Duration = Duration::from_secs(600);

struct World {
    server: Server,
    args: [String; 2],
    node: Rc<NbdNode>,
    disk: Rc<Disk>,
    _image: tempfile::NamedTempFile,
}

impl World {
    async fn new() -> Self {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(16 * CLUSTER).unwrap();
        let args = ["file".to_owned(), image.path().to_str().unwrap().to_owned()];
        let server = Server::nbdkit(&[&args[0], &args[1]]);
        let options = NbdOptions { retry: DELAY, repeat_changes: true, ..NbdOptions::default() };
        let node = NbdNode::connect(&server.uri(), options).await.unwrap();
        let disk = Disk::new(node.clone(), Rc::new(TokioClock::new()), DiskOptions::default());
        Self { server, args, node, disk, _image: image }
    }

    fn come_back(&mut self) {
        self.server.restart_nbdkit(&[&self.args[0], &self.args[1]]);
    }

    async fn write(&self, cluster: u64, byte: u8) -> headwater_block::Result<()> {
        let data = filled(byte);
        self.disk.write(cluster * CLUSTER, data, WriteFlags::default()).await
    }
}

/// A cluster of this byte.
fn filled(byte: u8) -> Buffer {
    Buffer::copy_of(&vec![byte; CLUSTER as usize])
}

/// Lets time pass, in which nothing that is still waited for comes.
async fn still_waits<F: Future>(mut work: Pin<&mut F>) {
    let waited = tokio::time::timeout(Duration::from_millis(400), &mut work).await;
    assert!(waited.is_err(), "it should wait");
}

#[test]
fn a_change_that_is_recalled_ends_and_others_wait_on() {
    run(async {
        let mut world = World::new().await;
        world.write(0, 1).await.unwrap();
        world.server.stop();
        let (switch, disk) = (Abort::new(), world.disk.clone());
        let write = |cluster: u64, byte: u8| {
            let data = filled(byte);
            disk.write(cluster * CLUSTER, data, WriteFlags::default())
        };
        let both = async { (write(1, 2).await, disk.flush().await) };
        let mut of_job = Box::pin(disk.recallable(&switch, both));
        let mut of_guest = Box::pin(write(2, 3));
        still_waits(of_job.as_mut()).await;
        still_waits(of_guest.as_mut()).await;
        switch.abort();
        let (written, flushed) = of_job.await;
        assert_eq!(written.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(flushed.unwrap_err().kind(), ErrorKind::Cancelled);
        // Nobody has recalled that one.
        still_waits(of_guest.as_mut()).await;
        world.come_back();
        of_guest.await.unwrap();
        // The disk is as good as before, also where the change was recalled.
        write(1, 4).await.unwrap();
        disk.flush().await.unwrap();
        for (cluster, byte) in [(0, 1), (1, 4), (2, 3)] {
            let found = read(&*world.node, cluster * CLUSTER, CLUSTER as usize).await.unwrap();
            assert!(found.iter().all(|found| *found == byte), "cluster {cluster}");
        }
    });
}

#[test]
fn at_the_end_nobody_waits_and_what_is_connected_works() {
    run(async {
        let mut world = World::new().await;
        world.write(0, 1).await.unwrap();
        world.node.stop_waiting();
        world.write(1, 2).await.unwrap();
        world.disk.flush().await.unwrap();
        world.server.stop();
        assert!(world.write(2, 3).await.unwrap_err().kind().may_pass());
        assert_eq!(world.write(2, 3).await.unwrap_err().kind(), ErrorKind::Unavailable);
    });
}

#[test]
fn requests_that_wait_end_when_nobody_is_to_wait_any_more() {
    run(async {
        let mut world = World::new().await;
        world.server.stop();
        let (node, disk) = (&world.node, &world.disk);
        let mut reads = Box::pin(read(&**node, 0, 4096));
        let data = filled(1);
        let mut writes = Box::pin(disk.write(0, data, WriteFlags::default()));
        still_waits(reads.as_mut()).await;
        still_waits(writes.as_mut()).await;
        node.stop_waiting();
        assert_eq!(reads.await.unwrap_err().kind(), ErrorKind::Unavailable);
        assert_eq!(writes.await.unwrap_err().kind(), ErrorKind::Unavailable);
    });
}

#[test]
fn a_flush_waits_only_for_changes_that_somebody_would_miss() {
    run(async {
        // A job wrote, and didn't end well.
        let mut world = World::new().await;
        let switch = Abort::new();
        world.disk.recallable(&switch, world.write(0, 1)).await.unwrap();
        world.server.stop();
        let mut of_job = Box::pin(world.disk.recallable(&switch, world.disk.flush()));
        still_waits(of_job.as_mut()).await;
        drop(of_job);
        world.disk.flush().await.unwrap();
        world.node.close().await.unwrap();

        let mut world = World::new().await;
        world.disk.recallable(&switch, world.write(0, 1)).await.unwrap();
        world.write(1, 2).await.unwrap();
        world.server.stop();
        let node = world.node.clone();
        let mut close = Box::pin(node.close());
        still_waits(close.as_mut()).await;
        world.come_back();
        close.await.unwrap();
    });
}
