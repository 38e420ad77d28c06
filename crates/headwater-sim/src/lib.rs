//! headwater-sim.
