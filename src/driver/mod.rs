//! driver
pub mod config;
