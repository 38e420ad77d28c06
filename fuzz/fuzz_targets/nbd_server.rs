#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::nbd_server`.

headwater_fuzz::entry!(nbd_server);
