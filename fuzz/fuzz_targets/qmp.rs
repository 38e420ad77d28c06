#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::qmp`.

headwater_fuzz::entry!(qmp);
