//! Tests of the reply codec.
