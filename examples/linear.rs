//! From a model's last hidden states and its head to the loss, and back: no tensor of logits, [B, T, V].
//!
//! cargo run --release --example linear

use candle_core::{Device, Tensor, Var};
use ppo_kernels::linear::{linear_logprobs, LinearInputs, LinearOptions};
use ppo_kernels::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::Cpu;
    let hidden = Var::from_tensor(&Tensor::randn(0f32, 1.0, (2, 3, 64), &device)?)?; // [B, T, H]
    let weight = Var::from_tensor(&Tensor::randn(0f32, 0.1, (1000, 64), &device)?)?; // [V, H]
    let targets = Tensor::new(&[[5u32, 17, 999], [0, 1, 2]], &device)?; // [B, T]
    let advantages = Tensor::new(&[[0.5f32, 0.5, 0.5], [-0.5, -0.5, -0.5]], &device)?;

    // A tile of logits at a time; true asks for the entropy too.
    let inputs = LinearInputs::new(&hidden, &weight, &targets);
    let output = linear_logprobs(&inputs, &LinearOptions::default(), true)?;
    let (logp, entropy) = (output.logp, output.entropy.ok_or("no entropy")?);
    let old_logp = logp.detach();
    let inputs = PpoLossInputs {
        entropy: Some(&entropy),
        ..PpoLossInputs::new(&logp, &old_logp, &advantages)
    };
    let options = PpoLossOptions { entropy_coef: 0.01, ..PpoLossOptions::dapo() };
    let grads = ppo_loss(&inputs, &options)?.loss.backward()?;
    for (name, var) in [("hidden", &hidden), ("weight", &weight)] {
        let grad = grads.get(var).ok_or("no gradient")?;
        assert_eq!(grad.dims(), var.dims());
        println!("d{name} {:?}", grad.dims());
    }
    Ok(())
}
