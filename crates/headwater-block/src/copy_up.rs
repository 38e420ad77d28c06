//! copy_up
