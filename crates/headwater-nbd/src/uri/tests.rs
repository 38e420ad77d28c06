//! Tests of NBD addresses.
