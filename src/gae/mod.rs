//! gae
