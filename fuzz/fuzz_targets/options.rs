#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::options`.

headwater_fuzz::entry!(options);
