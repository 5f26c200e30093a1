//! The CUDA kernels measured on a GPU, beside a copy within the device and, with the feature `candle`,
//! beside candle's own ops.

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

fn main() {
    let table = table::Table::new(Gpu::get());
    logprob::time(&table);
    kl::time(&table);
    gae::time(&table);
    ppo_loss::time(&table);
}
