//! kl
