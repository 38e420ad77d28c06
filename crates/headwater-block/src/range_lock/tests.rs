//! Tests of the range lock against a naive oracle.
