#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::nbd_codec`.

headwater_fuzz::entry!(nbd_codec);
