//! driver

pub mod generate;
pub mod load;
pub mod model;
pub mod tokenizer;
