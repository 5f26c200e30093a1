//! PPO where it comes from: a pole is kept upright on a cart, by the same `gae` and `ppo_loss` that train
//! language models. Solved is a mean return of 475 over 100 episodes.
//!
//!     cargo run --release --example cartpole

mod environment;

use candle_core::{DType, Device, Tensor, Var};
use environment::{CartPole, End};
use ppo_kernels::driver::optim::Optimizer;
use ppo_kernels::gae::{gae, GaeInputs, GaeOptions};
use ppo_kernels::logprob::{logprobs_and_entropy, LogprobOptions};
use ppo_kernels::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions};
use ppo_kernels::whiten::{masked_whiten, WhitenOptions};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const ENVIRONMENTS: usize = 32;
const STEPS: usize = 64;
const UPDATES: usize = 150;
const EPOCHS: usize = 4;
const MINIBATCH: usize = 512;
const LEARNING_RATE: f64 = 2e-3;
const GAMMA: f64 = 0.99;
const SOLVED: f64 = 475.0;

/// Two hidden layers of 64 units.
struct Mlp(Vec<(String, Var)>);

impl Mlp {
    /// With small weights in the last layer, so that at first all actions are alike.
    fn new(name: &str, outputs: usize, rng: &mut StdRng) -> anyhow::Result<Self> {
        let mut layers = Vec::new();
        for (i, (rows, columns, scale)) in
            [(4, 64, 1.0), (64, 64, 1.0), (64, outputs, 0.01)].into_iter().enumerate()
        {
            let bound = scale * (3.0 / rows as f32).sqrt();
            let weight: Vec<f32> =
                (0..rows * columns).map(|_| rng.random_range(-bound..bound)).collect();
            let weight = Tensor::from_vec(weight, (rows, columns), &Device::Cpu)?;
            layers.push((format!("{name}.{i}.weight"), Var::from_tensor(&weight)?));
            let bias = Var::zeros(columns, DType::F32, &Device::Cpu)?;
            layers.push((format!("{name}.{i}.bias"), bias));
        }
        Ok(Self(layers))
    }

    /// `[N, 4]` to `[N, outputs]`.
    fn forward(&self, states: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = states.clone();
        for (i, layer) in self.0.chunks(2).enumerate() {
            if i > 0 {
                x = x.tanh()?;
            }
            x = x.matmul(&layer[0].1)?.broadcast_add(&layer[1].1)?;
        }
        Ok(x)
    }
}

/// A rollout, all `[ENVIRONMENTS, STEPS]`.
#[derive(Default)]
struct Rollout {
    states: Vec<f32>,
    actions: Vec<u32>,
    rewards: Vec<f32>,
    dones: Vec<u8>,
}

fn main() -> anyhow::Result<()> {
    let start = std::time::Instant::now();
    let device = &Device::Cpu;
    let mut rng = StdRng::seed_from_u64(1);
    let policy = Mlp::new("policy", 2, &mut rng)?;
    let critic = Mlp::new("critic", 1, &mut rng)?;
    let parameters = [&policy.0[..], &critic.0[..]].concat();
    let mut optimizer = Optimizer::new(&parameters, 0.0, 0.5)?;
    let mut carts: Vec<CartPole> = (0..ENVIRONMENTS).map(|_| CartPole::new(&mut rng)).collect();
    let mut returns: Vec<f64> = Vec::new();

    for update in 1..=UPDATES {
        // Step by step for all carts, then laid out row by row.
        let mut columns: Vec<Rollout> = Vec::new();
        for _ in 0..STEPS {
            let states = carts.iter().flat_map(|cart| cart.state).collect();
            let mut column = Rollout { states, ..Rollout::default() };
            let states = Tensor::from_slice(&column.states, (ENVIRONMENTS, 4), device)?;
            let logits = policy.forward(&states)?.to_vec2::<f32>()?;
            for (cart, logits) in carts.iter_mut().zip(&logits) {
                let right = rng.random::<f32>() < 1.0 / (1.0 + (logits[0] - logits[1]).exp());
                let end = cart.step(right);
                let mut reward = 1.0;
                if end != End::None {
                    returns.push(cart.steps as f64);
                    if end == End::Truncated {
                        // What would have come after counts, though the episode is over.
                        let last = Tensor::from_slice(&cart.state, (1, 4), device)?;
                        let value = critic.forward(&last)?.flatten_all()?.to_vec1::<f32>()?[0];
                        reward += GAMMA as f32 * value;
                    }
                    *cart = CartPole::new(&mut rng);
                }
                column.actions.push(u32::from(right));
                column.rewards.push(reward);
                column.dones.push(u8::from(end != End::None));
            }
            columns.push(column);
        }
        let mut rollout = Rollout::default();
        for i in 0..ENVIRONMENTS {
            for column in &columns {
                rollout.states.extend(&column.states[4 * i..4 * i + 4]);
                rollout.actions.push(column.actions[i]);
                rollout.rewards.push(column.rewards[i]);
                rollout.dones.push(column.dones[i]);
            }
        }

        // Advantages by rows of [environments, steps], cut where an episode ended, and going on with the
        // value of the state that the rollout ended in.
        let (shape, n) = ((ENVIRONMENTS, STEPS), ENVIRONMENTS * STEPS);
        let states = Tensor::from_vec(rollout.states, (n, 4), device)?;
        let actions = Tensor::from_vec(rollout.actions, n, device)?;
        let rewards = Tensor::from_vec(rollout.rewards, shape, device)?;
        let dones = Tensor::from_vec(rollout.dones, shape, device)?;
        let options = LogprobOptions::default();
        let old_logp = logprobs_and_entropy(&policy.forward(&states)?, &actions, &options)?.0;
        let old_logp = old_logp.detach();
        let old_values = critic.forward(&states)?.reshape(shape)?.detach();
        let last: Vec<f32> = carts.iter().flat_map(|cart| cart.state).collect();
        let last = Tensor::from_vec(last, (ENVIRONMENTS, 4), device)?;
        let bootstrap = critic.forward(&last)?.flatten_all()?.detach();
        let inputs = GaeInputs {
            rewards: Some(&rewards),
            dones: Some(&dones),
            bootstrap: Some(&bootstrap),
            ..GaeInputs::new(&old_values)
        };
        let options = GaeOptions { gamma: GAMMA, lambda: 0.95, ..GaeOptions::default() };
        let estimated = gae(&inputs, &options)?;
        let advantages =
            masked_whiten(&estimated.advantages, None, &WhitenOptions::default())?.flatten_all()?;
        let (targets, old_values) = (estimated.returns.flatten_all()?, old_values.flatten_all()?);

        let rate = LEARNING_RATE * (UPDATES - update + 1) as f64 / UPDATES as f64;
        let mut order: Vec<u32> = (0..n as u32).collect();
        for _ in 0..EPOCHS {
            order.shuffle(&mut rng);
            for rows in order.chunks(MINIBATCH) {
                let rows = Tensor::new(rows, device)?;
                let pick = |x: &Tensor| x.index_select(&rows, 0)?.unsqueeze(0);
                let states = states.index_select(&rows, 0)?;
                let actions = actions.index_select(&rows, 0)?;
                let options = LogprobOptions::default();
                let (logp, entropy) =
                    logprobs_and_entropy(&policy.forward(&states)?, &actions, &options)?;
                let values = critic.forward(&states)?.t()?.contiguous()?;
                let (logp, entropy) = (logp.unsqueeze(0)?, entropy.unsqueeze(0)?);
                let [old_logp, advantages] = [pick(&old_logp)?, pick(&advantages)?];
                let inputs = PpoLossInputs {
                    values: Some(&values),
                    old_values: Some(&pick(&old_values)?),
                    returns: Some(&pick(&targets)?),
                    entropy: Some(&entropy),
                    ..PpoLossInputs::new(&logp, &old_logp, &advantages)
                };
                let options = PpoLossOptions {
                    value_clip_range: None,
                    value_coef: 0.5,
                    entropy_coef: 0.01,
                    ..PpoLossOptions::default()
                };
                let mut grads = ppo_loss(&inputs, &options)?.loss.backward()?;
                let norm = optimizer.grad_norm(&grads)?;
                optimizer.apply(&mut grads, norm, rate)?;
            }
        }

        let last = &returns[returns.len().saturating_sub(100)..];
        let mean = last.iter().sum::<f64>() / last.len().max(1) as f64;
        let solved = last.len() == 100 && mean >= SOLVED;
        if update % 10 == 0 || solved {
            println!(
                "{:>7} steps, {:>5} episodes: mean return {mean:.1} of the last {}",
                update * n,
                returns.len(),
                last.len()
            );
        }
        if solved {
            println!("solved in {:.1} s", start.elapsed().as_secs_f64());
            return Ok(());
        }
    }
    anyhow::bail!("not solved")
}
