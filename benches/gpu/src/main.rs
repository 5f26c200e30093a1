//! The CUDA kernels measured on a GPU, beside a copy within the device.

mod clock;
// As the tests have them.
#[allow(dead_code, unused_imports)]
#[path = "../../../tests/common/device.rs"]
mod device;
#[allow(dead_code)]
#[path = "../../../tests/common/gpu.rs"]
mod gpu;
mod logprob;

use gpu::Gpu;

fn main() {
    let gpu = Gpu::get();
    println!("{}", clock::describe(gpu));
    let copy = clock::copy_bandwidth(gpu);
    println!("copy, read + written: {copy:.0} GB/s");
    println!("\n| op | dtype | shape | us | GB/s | of copy |\n|---|---|---|---|---|---|");
    logprob::time(gpu, copy);
}
