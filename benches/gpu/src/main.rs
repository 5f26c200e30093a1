//! The CUDA kernels measured on a GPU, beside a copy within the device and, with the feature `candle`,
//! beside candle's own ops.
//!
//! `time [--no-clusters] [PART OF A PASS'S NAME]`

#[cfg(feature = "candle")]
mod beside;
#[cfg(feature = "candle")]
#[path = "../../common/mod.rs"]
mod common;
// As the tests have them.
#[allow(dead_code, unused_imports)]
#[path = "../../../tests/common/device.rs"]
mod device;
mod gae;
#[allow(dead_code)]
#[path = "../../../tests/common/gpu.rs"]
mod gpu;
mod inputs;
mod kl;
mod logprob;
mod ppo_loss;
mod table;

use gpu::Gpu;
use table::{Arguments, Table};

fn main() {
    let mut arguments = Arguments::default();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--no-clusters" => arguments.no_clusters = true,
            _ => arguments.only = argument,
        }
    }
    let table = Table::new(Gpu::get(), arguments);
    logprob::time(&table);
    kl::time(&table);
    gae::time(&table);
    ppo_loss::time(&table);
}
