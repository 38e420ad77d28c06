#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::manifest`.

headwater_fuzz::entry!(manifest);
