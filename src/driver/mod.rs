//! driver

pub mod model;
