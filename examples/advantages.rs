//! Advantages: from a critic's values by GAE, with shaped rewards and whitening; and without one, from a score
//! of each answer to a prompt.
//!
//! cargo run --release --example advantages

use candle_core::{Device, Tensor};
use ppo_kernels::advantages::{outcome_advantages, AdvantageInputs, AdvantageOptions};
use ppo_kernels::gae::{gae, GaeInputs, GaeOptions, RewardShaping};
use ppo_kernels::whiten::{masked_whiten_with, WhitenOptions};

fn main() -> ppo_kernels::Result<()> {
    let device = Device::Cpu;
    let values = Tensor::new(&[[0.1f32, 0.2, 0.3, 0.0], [0.0, 0.1, 0.1, 0.2]], &device)?; // [B, T]
    let kl = Tensor::new(&[[0.0f32, 0.1, 0.0, 0.0], [0.1, 0.0, 0.2, 0.0]], &device)?; // [B, T]
    let mask = Tensor::new(&[[1u8, 1, 1, 0], [1, 1, 1, 1]], &device)?; // 0: padding
    let scores = Tensor::new(&[1.0f32, -0.5], &device)?; // [B], from the reward model

    // The KL penalty off every token's reward, the score onto the last token's; then the recurrence.
    let inputs = GaeInputs {
        kl: Some(&kl),
        scores: Some(&scores),
        mask: Some(&mask),
        ..GaeInputs::new(&values)
    };
    let shaping = RewardShaping { kl_coef: 0.05, ..Default::default() };
    let options = GaeOptions { gamma: 1.0, lambda: 0.95, shaping, ..Default::default() };
    let out = gae(&inputs, &options)?;
    // Their moments come with them: whitening needs no pass of its own over the tokens.
    let whitening = WhitenOptions::default();
    let white = masked_whiten_with(&out.advantages, Some(&mask), &out.moments, &whitening)?;
    // The score of the shorter row is on its last token.
    assert_eq!(out.rewards.to_vec2::<f32>()?[0][2..], [1.0, 0.0]);
    assert!(white.mean_all()?.to_scalar::<f32>()?.abs() < 1e-6);
    println!("rewards {:?}", out.rewards.to_vec2::<f32>()?);
    println!("returns {:?}", out.returns.to_vec2::<f32>()?);
    println!("advantages, whitened {:?}", white.to_vec2::<f32>()?);

    // Equal ids are answers to one prompt; GRPO here, and RLOO, OPO and others by their names.
    let groups = Tensor::new(&[17i64, 17], &device)?;
    let inputs = AdvantageInputs {
        groups: Some(&groups),
        mask: Some(&mask),
        ..AdvantageInputs::new(&scores)
    };
    let out = outcome_advantages(&inputs, 0, &AdvantageOptions::grpo())?;
    let of_tokens = out.token_advantages.expect("asked for with the mask");
    println!("GRPO {:?}", of_tokens.to_vec2::<f32>()?);
    assert_eq!(out.stats.to_host()?.zero_std_fraction, 0.0, "there is something to learn");
    Ok(())
}
