//! headwater-image.
