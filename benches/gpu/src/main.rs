//! The CUDA kernels measured on a GPU, beside a copy within the device and, with the feature `candle`,
//! beside candle's own ops. `time --help` says what it takes.

mod advantages;
mod arguments;
#[cfg(feature = "candle")]
mod beside;
#[cfg(feature = "candle")]
#[path = "../../common/mod.rs"]
mod common;
mod correction;
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

use std::process::ExitCode;
use std::time::Instant;

use arguments::{Arguments, USAGE};
use gpu::Gpu;
use table::Table;

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if arguments.help {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    if let Err(error) = ppo_kernels::cuda::device_count() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let start = Instant::now();
    let table = Table::new(Gpu::get(), arguments);
    logprob::time(&table);
    kl::time(&table);
    gae::time(&table);
    advantages::time(&table);
    correction::time(&table);
    ppo_loss::time(&table);
    println!("\nmeasured in {:.1} s", start.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
