//! Tests of receive.
