#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::http`.

headwater_fuzz::entry!(http);
