#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::qcow2_image`.

headwater_fuzz::entry!(qcow2_image);
