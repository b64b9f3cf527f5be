//! The only host crate with `unsafe`.
