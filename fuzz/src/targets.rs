//! The targets, one in each module. `guest` and `image` are what those on images share, `runtime` what those on sockets share, `front_end`
//! speaks for `vhost_user`.

mod front_end;
mod guest;
pub mod http;
mod image;
pub mod manifest;
pub mod names;
pub mod nbd_client;
pub mod nbd_codec;
pub mod nbd_server;
pub mod options;
pub mod qcow2_header;
pub mod qcow2_image;
pub mod qcow2_io;
pub mod qmp;
mod runtime;
pub mod tls;
pub mod vhost_user;
