#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::vhost_user`.

headwater_fuzz::entry!(vhost_user);
