//! Servers that end without taking their files away, and kernels that offer no ring.

use crate::ring::{Way, without_ring};
use crate::{MIB, Mount, WAY, open, options, pattern, run, start};
use headwater_export::Removal;
use std::mem::ManuallyDrop;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;

/// With requests in the kernel that the server hasn't seen, and more of them than the ring has entries.
#[test]
fn who_waits_for_a_server_that_ends_gets_an_error() {
    for way in Way::all() {
        WAY.set(way);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = tokio::task::LocalSet::new();
        let mount = server.block_on(&runtime, Mount::new(pattern(MIB), true, false));
        let files = server.block_on(&runtime, mount.client(|path| [(); 100].map(|()| open(path))));
        let (sender, answers) = mpsc::channel();
        let clients = files.map(|file| {
            let sender = sender.clone();
            std::thread::spawn(move || {
                // Closing it asks the server, too.
                let read = ManuallyDrop::new(&file).read_exact_at(&mut [0; 4096], 4096);
                sender.send(read.is_err()).unwrap();
            })
        });
        // So that they are all under way.
        std::thread::sleep(Duration::from_millis(100));
        drop(server);
        drop(runtime);
        for _ in 0..clients.len() {
            assert!(answers.recv_timeout(Duration::from_secs(20)).expect("nobody waits for long"), "{way:?}");
        }
        clients.into_iter().for_each(|client| client.join().unwrap());
        drop(mount);
    }
}

#[test]
fn without_a_ring_requests_come_through_the_file() {
    run(async || {
        let mount = Mount::new(pattern(MIB), true, false).await;
        mount.export.remove(Removal::Safe).await.unwrap().await;
        let export = without_ring(start(&mount.path, options(&mount.disk, mount.told.clone())));
        let Some(export) = export.await else { return };
        assert_eq!(mount.client(|path| std::fs::read(path).unwrap()).await, pattern(MIB));
        let (over_ring, through_file) = export.requests();
        assert!(over_ring == 0 && through_file > 0, "{over_ring}, {through_file}");
        export.remove(Removal::Safe).await.unwrap().await;
    });
}
