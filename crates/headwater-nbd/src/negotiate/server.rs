//! The server's side of negotiation.
