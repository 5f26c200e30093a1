//! driver
pub mod config;
pub mod prompts;
pub mod report;
pub mod reward;
