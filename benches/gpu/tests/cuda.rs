//! All tests of the CUDA kernels, a module for each file, such as `logprob_cuda`.
// Each has the shared modules as its own.
#![allow(clippy::duplicate_mod)]

include!(concat!(env!("OUT_DIR"), "/tests.rs"));
