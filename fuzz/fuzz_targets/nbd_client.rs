#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::nbd_client`.

headwater_fuzz::entry!(nbd_client);
