//! Log-probabilities and entropies of sampled tokens from logits, and how far a policy has moved from its
//! reference.
//!
//! cargo run --release --example logprob

use candle_core::{Device, Tensor, Var};
use ppo_kernels::kl::{full_kl, token_kl, FullKlOptions, KlEstimator, KlOptions};
use ppo_kernels::logprob::{logprobs, logprobs_and_entropy, LogprobOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::Cpu;
    // [B, T, V] from the models, and the tokens that were sampled, [B, T].
    let logits = Var::from_tensor(&Tensor::randn(0f32, 1.0, (2, 3, 1000), &device)?)?;
    let ref_logits = Tensor::randn(0f32, 1.0, (2, 3, 1000), &device)?;
    let targets = Tensor::new(&[[5u32, 17, 999], [0, 1, 2]], &device)?;

    // As they were drawn: at the temperature of the sampler.
    let options = LogprobOptions { temperature: 0.7, ..Default::default() };
    let (logp, entropy) = logprobs_and_entropy(&logits, &targets, &options)?; // [B, T] each
    assert_eq!((logp.dims(), entropy.dims()), (&[2, 3][..], &[2, 3][..]));
    println!("logp {:?}", logp.to_vec2::<f32>()?);
    println!("entropy {:?}", entropy.to_vec2::<f32>()?);

    // The gradient goes to the logits, without a tensor of probabilities.
    let grads = (logp.mean_all()? - (entropy.mean_all()? * 0.01)?)?.backward()?;
    let dlogits = grads.get(&logits).ok_or("no gradient")?;
    // What one token gains the others lose.
    assert!(dlogits.sum(2)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
    println!("dlogits {:?}", dlogits.dims());

    // Estimated from the sampled tokens, and exactly from both rows of logits.
    let ref_logp = logprobs(&ref_logits, &targets, &options)?;
    let k3 = KlOptions { estimator: KlEstimator::K3, ..Default::default() };
    println!("k3 {:?}", token_kl(&logp, &ref_logp, None, &k3)?.to_vec2::<f32>()?);
    let exact = full_kl(&logits, &ref_logits, None, &FullKlOptions::default())?;
    assert!(exact.min_all()?.to_scalar::<f32>()? >= 0.0);
    println!("KL {:?}", exact.to_vec2::<f32>()?);
    Ok(())
}
