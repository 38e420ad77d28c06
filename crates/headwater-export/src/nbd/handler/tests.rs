//! Tests of handler.
