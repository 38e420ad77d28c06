//! headwater-storage.
