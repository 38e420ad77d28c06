//! The vhost-user-blk server seen from outside, by a front end that is made by hand: what it offers and does ([`requests`]), how it survives
//! nonsense ([`hostile`]), how work goes on after it was killed or its export was taken away ([`life`]), and that what was durable stays so
//! ([`durable`]).

mod durable;
mod hostile;
mod life;
mod requests;
mod server;
