#![cfg_attr(fuzzing, no_main)]
//! See `headwater_fuzz::targets::names`.

headwater_fuzz::entry!(names);
