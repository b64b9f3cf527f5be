//! Engine 2.
