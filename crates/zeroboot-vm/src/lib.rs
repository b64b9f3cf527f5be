//! Engine 1.
