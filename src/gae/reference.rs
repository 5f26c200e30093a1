//! The op in plain f64 loops: make a list of steps, then walk it backwards.

use std::ops::Range;

use super::{GaeOptions, MaskMode, ScorePlacement, OP};
use crate::memory::in_space;
use crate::moments::Moments;
use crate::pack::RowRanges;
use crate::whiten;

in_space!(HostF64: Inputs);

/// The results of [`gae`], each `[B, T]`, or `[N]` of a pack, and 0 where masked.
#[derive(Debug, Clone, PartialEq)]
pub struct Gae {
    /// Advantages.
    pub advantages: Vec<f64>,
    /// Returns: the targets of the value function.
    pub returns: Vec<f64>,
    /// The rewards after shaping.
    pub rewards: Vec<f64>,
    /// Moments of the unmasked advantages.
    pub moments: Moments,
}

/// A step of the recurrence.
struct Step {
    /// Where its outputs go, and whether the policy is trained there; `None` for a gap.
    output: Option<(usize, bool)>,
    reward: f64,
    value: f64,
    done: bool,
}

/// Advantages, returns and shaped rewards of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len`
/// tokens in all.
///
/// # Panics
/// If a slice is shorter than its shape says, or the offsets are none.
pub fn gae(inputs: &Inputs, batch: usize, seq_len: usize, options: &GaeOptions) -> Gae {
    let rows = RowRanges::new(OP, seq_len, inputs.offsets).expect("offsets");
    let zeros = vec![0.0; inputs.values.len()];
    let mut out = Gae {
        advantages: zeros.clone(),
        returns: zeros.clone(),
        rewards: zeros,
        moments: Moments::default(),
    };
    for row in 0..batch {
        let mut next_value = inputs.bootstrap.map_or(0.0, |bootstrap| bootstrap[row]);
        let (mut advantage, mut value_advantage) = (0.0, 0.0);
        let lambda = inputs.lambda_per_row.map_or(options.lambda, |lambdas| lambdas[row]);
        let options = &options.with_lambda(lambda);
        for step in steps(inputs, row, rows.range(row), options).iter().rev() {
            if step.done {
                (next_value, advantage, value_advantage) = (0.0, 0.0, 0.0);
            }
            let delta = step.reward + options.gamma * next_value - step.value;
            advantage = delta + options.gamma * options.lambda * advantage;
            value_advantage = delta + options.gamma * options.lambda_of_returns() * value_advantage;
            next_value = step.value;

            if let Some((i, is_token)) = step.output {
                out.advantages[i] = if is_token { advantage } else { 0.0 };
                out.returns[i] = value_advantage + step.value;
                out.rewards[i] = step.reward;
            }
        }
    }
    out.moments = whiten::reference::masked_moments(&out.advantages, inputs.mask);
    out
}

/// The steps of a row in order of time, from its first unmasked token on.
fn steps(inputs: &Inputs, row: usize, range: Range<usize>, options: &GaeOptions) -> Vec<Step> {
    let seq_len = range.len();
    let at = |t: usize| range.start + t;
    let keeps = |t: usize| inputs.mask.is_none_or(|mask| mask[at(t)] != 0);
    let tokens: Vec<usize> = (0..seq_len).filter(|&t| keeps(t)).collect();
    let (Some(&first), Some(&last)) = (tokens.first(), tokens.last()) else {
        return Vec::new();
    };

    let mut steps: Vec<Step> = Vec::new();
    for t in first..=last {
        if keeps(t) {
            let dense = inputs.rewards.map_or(0.0, |rewards| rewards[at(t)]);
            let kl_coef = options.shaping.kl_coef;
            let kl = inputs.kl.filter(|_| kl_coef != 0.0);
            let penalty = kl.map_or(0.0, |kl| kl_coef * kl[at(t)]);
            steps.push(Step {
                output: Some((at(t), true)),
                reward: dense - penalty,
                value: inputs.values[at(t)],
                done: inputs.dones.is_some_and(|dones| dones[at(t)] != 0),
            });
        } else if options.mask_mode == MaskMode::Multiply {
            steps.push(Step { output: None, reward: 0.0, value: 0.0, done: false });
        }
    }

    if let Some(scores) = inputs.scores {
        let has_eos = inputs.has_eos.is_none_or(|has_eos| has_eos[row] != 0);
        let score = options.shaping.score(scores[row], has_eos);
        let has_room = last + 1 < seq_len;
        if options.shaping.score_placement == ScorePlacement::AfterLastToken && has_room {
            let i = at(last + 1);
            let value = inputs.values[i];
            steps.push(Step { output: Some((i, false)), reward: score, value, done: false });
        } else if let Some(step) = steps.last_mut() {
            step.reward += score;
        }
    }
    steps
}
