//! The CUDA kernels on a GPU: `check` compares them with the f64 references, `check small` does so on
//! the small cases only (for compute-sanitizer), `time` measures them beside a copy of the device.

mod device;
mod logprob;

use device::Device;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let device = match Device::new() {
        Ok(device) => device,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    match words.as_slice() {
        ["check"] => logprob::check(&device, false),
        ["check", "small"] => logprob::check(&device, true),
        ["time"] => {
            println!("{}", device.describe());
            let copy = device.copy_bandwidth();
            println!("copy, read + written: {copy:.0} GB/s");
            println!("\n| op | dtype | shape | us | GB/s | of copy |\n|---|---|---|---|---|---|");
            logprob::time(&device, copy);
        }
        _ => {
            eprintln!("usage: ppo-kernels-gpu check [small] | time");
            std::process::exit(2);
        }
    }
}
