//! The addresses at which a disk is served.

use crate::address::{ActivatedAddress, Address, FuseAddress, UblkAddress, VhostAddress};
use crate::failure::{Failure, Outcome};
use futures_util::future::join_all;
use headwater_block::{Disk, Edge};
use headwater_export::fuse::{self, FuseExport, FuseOptions, MountOptions};
use headwater_export::nbd::{Export, NbdServer, ServerOptions};
use headwater_export::ublk::{Ublk, UblkOptions};
use headwater_export::vhost::{BlkExport, BlkOptions, VhostUserBlk};
use headwater_export::{Listen, Removal};
use headwater_nbd::{NbdUri, UriTls};
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

/// Servers that run until they are told to stop.
#[derive(Default)]
pub struct Exports {
    servers: Vec<NbdServer>,
    /// Shared with the files, which tell machines of a new size.
    machines: Rc<RefCell<Vec<VhostUserBlk>>>,
    files: Vec<File>,
    devices: Vec<Ublk>,
    addresses: Vec<Address>,
}

/// A disk that is there as a file.
struct File {
    export: FuseExport,
    /// The file below is ours, and goes with us.
    made: Option<PathBuf>,
}

impl Exports {
    /// Serves `disk` at each of `addresses`, from now on: clients can come when this returns. URIs of one address that differ in the
    /// name only share a server. Must be called inside a `LocalSet`.
    ///
    /// # Errors
    /// If an address can't be had, or is given twice with the same name; then none is served.
    pub async fn start(addresses: &[Address], disk: &Rc<Disk>, writable: bool) -> Outcome<Self> {
        let mut exports = Self::default();
        match exports.start_all(addresses, disk, writable).await {
            Ok(()) => Ok(exports),
            Err(failure) => {
                exports.stop().await;
                Err(failure)
            }
        }
    }

    async fn start_all(&mut self, addresses: &[Address], disk: &Rc<Disk>, writable: bool) -> Outcome {
        let edge = Edge::new(disk.clone());
        let of_nbd = |address: &Address| match address {
            Address::Nbd(uri) => Some(uri.clone()),
            Address::Activated(_) | Address::Fuse(_) | Address::VhostUserBlk(_) | Address::Ublk(_) => None,
        };
        self.start_nbd(&addresses.iter().filter_map(of_nbd).collect::<Vec<_>>(), &edge, writable)?;
        for address in addresses {
            match address {
                Address::Nbd(_) => {}
                Address::Activated(socket) => self.start_activated(socket, &edge, writable)?,
                Address::Fuse(file) => self.mount(file, &edge, writable).await?,
                Address::VhostUserBlk(machine) => self.start_vhost(machine, &edge, writable)?,
                Address::Ublk(device) => self.start_ublk(*device, &edge, writable).await?,
            }
        }
        Ok(())
    }

    fn start_nbd(&mut self, uris: &[NbdUri], edge: &Rc<Edge>, writable: bool) -> Outcome {
        let mut places = Vec::new();
        for uri in uris {
            if !places.contains(&(&uri.address, &uri.tls)) {
                places.push((&uri.address, &uri.tls));
            }
        }
        for (address, tls) in places {
            let options = ServerOptions {
                empty_name_is_only_export: true,
                tls: tls.as_ref().map(credentials).transpose()?,
                ..ServerOptions::default()
            };
            let server = NbdServer::start(address.into(), options)?;
            let bound = server.address().unwrap_or(address).clone();
            for uri in uris.iter().filter(|uri| (&uri.address, &uri.tls) == (address, tls)) {
                server.add(export(uri.export.clone(), edge, writable))?;
                self.addresses.push(Address::Nbd(NbdUri { address: bound.clone(), ..uri.clone() }));
            }
            self.servers.push(server);
        }
        Ok(())
    }

    /// An NBD server at a socket that listens already.
    fn start_activated(&mut self, address: &ActivatedAddress, edge: &Rc<Edge>, writable: bool) -> Outcome {
        let shares =
            |other: &Address| matches!(other, Address::Activated(other) if other.socket == address.socket);
        if self.addresses.iter().any(shares) {
            return Err(Failure::new(format!(
                "{}: a socket that was handed over has one export",
                Address::Activated(address.clone())
            )));
        }
        let socket = crate::inherited::listening(address.socket.as_deref())?;
        let options = ServerOptions { empty_name_is_only_export: true, ..ServerOptions::default() };
        let server = NbdServer::start(Listen::Fd(socket), options)?;
        server.add(export(address.export.clone(), edge, writable))?;
        self.servers.push(server);
        self.addresses.push(Address::Activated(address.clone()));
        Ok(())
    }

    fn start_vhost(&mut self, address: &VhostAddress, edge: &Rc<Edge>, writable: bool) -> Outcome {
        let VhostAddress { path, options } = address;
        let export = BlkExport {
            id: "headwater".to_owned(),
            edge: edge.clone(),
            options: BlkOptions { writable, ..*options },
        };
        self.machines.borrow_mut().push(VhostUserBlk::start(Listen::Unix { path: path.clone() }, export)?);
        self.addresses.push(Address::VhostUserBlk(address.clone()));
        Ok(())
    }

    async fn start_ublk(&mut self, address: UblkAddress, edge: &Rc<Edge>, writable: bool) -> Outcome {
        let UblkAddress { id, recover, logical_block } = address;
        let options = UblkOptions { edge: edge.clone(), writable, id, recover, logical_block };
        let device = Ublk::start(options).await?;
        self.addresses.push(Address::Ublk(UblkAddress { id: Some(device.id()), ..address }));
        self.devices.push(device);
        Ok(())
    }

    /// Mounts the disk over a file, which is made if it isn't there.
    async fn mount(&mut self, address: &FuseAddress, edge: &Rc<Edge>, writable: bool) -> Outcome {
        let FuseAddress { path, growable, allow_other } = address;
        let made = std::fs::File::create_new(path);
        let made = match made {
            Ok(_) => Some(path.clone()),
            // What is there is looked at when it is mounted over.
            Err(err) if err.kind() == std::io::ErrorKind::AlreadyExists => None,
            Err(err) => return Err(Failure::new(format!("cannot make {}: {err}", path.display()))),
        };
        let options = MountOptions { writable, allow_other: *allow_other };
        let export = match fuse::mount(path, options).await {
            Ok(mounted) => FuseExport::start(
                mounted,
                FuseOptions {
                    edge: edge.clone(),
                    writable,
                    writethrough: false,
                    growable: *growable,
                    over_ring: true,
                    resized: {
                        let machines = Rc::downgrade(&self.machines);
                        Box::new(move || {
                            if let Some(machines) = machines.upgrade() {
                                machines.borrow().iter().for_each(VhostUserBlk::look_at_size);
                            }
                        })
                    },
                },
            ),
            Err(err) => Err(err),
        };
        match export {
            Ok(export) => {
                self.files.push(File { export, made });
                self.addresses.push(Address::Fuse(address.clone()));
                Ok(())
            }
            Err(err) => {
                made.iter().for_each(remove);
                Err(err.into())
            }
        }
    }

    /// Where the disk is served, with the ports that the system chose where 0 was asked for.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// True if nobody is served.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Takes no more clients, finishes the requests that were received, and closes the connections. Those who have a file open are cut off.
    pub async fn stop(self) {
        let servers = join_all(self.servers.into_iter().map(NbdServer::stop));
        let machines = join_all(self.machines.take().into_iter().map(VhostUserBlk::stop));
        let devices = join_all(self.devices.into_iter().map(Ublk::stop));
        futures_util::future::join3(servers, machines, devices).await;
        for File { export, made } in self.files {
            match export.remove(Removal::Hard).await {
                Ok(removed) => removed.await,
                Err(err) => {
                    tracing::warn!("{err}");
                    continue;
                }
            }
            made.iter().for_each(remove);
        }
    }
}

fn export(name: String, edge: &Rc<Edge>, writable: bool) -> Export {
    Export {
        name,
        description: format!("headwater: {}", edge.disk().name()),
        edge: edge.clone(),
        writable,
        writethrough: false,
        allocation_depth: true,
    }
}

/// Removes a file that we made. What has been put there meanwhile isn't ours.
fn remove(path: &PathBuf) {
    if std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == 0) {
        // If it stays it is an empty file.
        let _ = std::fs::remove_file(path);
    }
}

/// What a server proves itself with where a URI wants TLS.
fn credentials(tls: &UriTls) -> headwater_block::Result<TlsCredentials> {
    let options = match tls {
        UriTls::Certificates { directory, verify_peer, .. } => TlsOptions::X509 {
            endpoint: Endpoint::Server,
            directory: directory.clone(),
            verify_peer: *verify_peer,
        },
        UriTls::Psk { keys, user: None } => TlsOptions::PskServer { keys: keys.clone() },
        UriTls::Psk { user: Some(user), .. } => {
            let message = format!("a server takes all users of its file of keys; leave out \"{user}@\"");
            return Err(headwater_block::Error::new(headwater_block::ErrorKind::InvalidInput, message));
        }
    };
    TlsCredentials::load(&options)
}
