//! PPO's loss with a value function, its gradients and statistics, and the same step by another loss of the
//! family.
//!
//! cargo run --release --example ppo_loss

use candle_core::{Device, Tensor, Var};
use ppo_kernels::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::Cpu;
    // From the models as they are now, [B, T] each.
    let logp = Var::new(&[[-1.0f32, -2.0, -0.5]], &device)?;
    let values = Var::new(&[[0.3f32, 0.1, 0.2]], &device)?;
    // From the rollout.
    let old_logp = Tensor::new(&[[-1.3f32, -1.9, -0.5]], &device)?;
    let old_values = Tensor::new(&[[0.2f32, 0.2, 0.2]], &device)?;
    let advantages = Tensor::new(&[[1.0f32, -0.5, 0.2]], &device)?;
    let returns = Tensor::new(&[[0.8f32, 0.4, 0.1]], &device)?;
    let mask = Tensor::new(&[[1u8, 1, 0]], &device)?;

    let policy =
        PpoLossInputs { mask: Some(&mask), ..PpoLossInputs::new(&logp, &old_logp, &advantages) };
    let inputs = PpoLossInputs {
        values: Some(&values),
        old_values: Some(&old_values),
        returns: Some(&returns),
        ..policy
    };
    let output = ppo_loss(&inputs, &PpoLossOptions::default())?;
    let grads = output.loss.backward()?;
    let of = |var: &Var| grads.get(var).ok_or("no gradient").map(Tensor::to_vec2::<f32>);
    let (dlogp, dvalues) = (of(&logp)??, of(&values)??);
    let stats = output.stats.to_host()?;
    // Its ratio, e^0.3, is beyond 1.2; what is masked has no gradient either.
    assert_eq!((dlogp[0][0], dlogp[0][2], stats.clip_fraction), (0.0, 0.0, 0.5));
    println!("dlogp {dlogp:?}, dvalues {dvalues:?}");
    println!("loss {}, clipped {}, KL {}", stats.loss, stats.clip_fraction, stats.approx_kl_k3);

    // GSPO: the ratio is that of the whole answer. Any option can be changed.
    let options = PpoLossOptions { clip_range: 1e-3, ..PpoLossOptions::of("gspo")? };
    let stats = ppo_loss(&policy, &options)?.stats.to_host()?;
    println!("GSPO: loss {}, clipped {}", stats.loss, stats.clip_fraction);
    Ok(())
}
