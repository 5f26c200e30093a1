//! The unit tests of `src/cpu` in a release build, where they look at every float. Apart from the library,
//! which would take ten times as long to compile once more.
#![cfg(not(debug_assertions))]
#![allow(dead_code, unused_imports)]

#[path = "../src/cpu/mod.rs"]
mod cpu;

use ppo_kernels::memory;
