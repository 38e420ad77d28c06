#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::tls`.

headwater_fuzz::entry!(tls);
