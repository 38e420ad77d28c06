#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::qcow2_header`.

headwater_fuzz::entry!(qcow2_header);
