//! The second phase of a step: what the models say of the responses, and the advantages.
//!
//! ```text
//! old_logp             policy      as it sampled, at the sampling temperature
//! ref_logp             reference   as the policy was before the run
//! values               critic      of the state before each token, where there is a critic
//! kl                   = estimate of KL(policy || reference), per token; what is reported is k1's
//! rewards              = the score, scaled and clipped, at the response's last token, less kl_coef kl
//!                        where the KL is in the reward
//! advantages, returns  = GAE over the rewards, or without a critic what is made of the rewards of a
//!                        response and of the others to its prompt; then whitened over the batch, if wanted
//! weights              = the correction of the probabilities with which the tokens were drawn, if wanted
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::{json, Map, Value};

use super::config::{AdvantageEstimator, KlPlacement, Settings};
use super::model::{Critic, Decoder};
use super::reward::Scores;
use super::rollout::Rollout;
use super::sequences::Sequences;
use crate::advantages::{
    gdpo, optimal_token_baseline, outcome_advantages, AdvantageInputs, AdvantageOptions,
    AdvantageStats, TokenBaselineInputs, TokenBaselineOptions,
};
use crate::correction::{correction, CorrectionInputs, CorrectionOutput, CorrectionStats};
use crate::gae::{gae, GaeInputs, GaeOptions, GaeOutput, MissingEos, RewardShaping, ScoreScale};
use crate::kl::{token_kl, KlEstimator, KlOptions};
use crate::moments::RunningMoments;
use crate::whiten::{masked_whiten, masked_whiten_with, WhitenOptions};

/// A rollout as the update needs it; all tensors f32 `[N]`, the tokens of the responses one behind the
/// other, without gradient.
pub struct Experience {
    /// Prompts with responses.
    pub sequences: Sequences,
    /// Log-probabilities under the policy that sampled.
    pub old_logp: Tensor,
    /// Advantages, whitened if the settings say so.
    pub advantages: Tensor,
    /// The critic's values and targets, if there is one.
    pub critic: Option<CriticExperience>,
    /// The KL term of the loss, if the KL goes there.
    pub kl_term: Option<KlTerm>,
    /// Importance weights of the tokens, with a correction.
    pub weights: Option<Tensor>,
    /// KL of each response to the reference, in nats: the sum of ln(p / p_reference) over its tokens,
    /// whatever the estimator of the penalty.
    pub kl: Vec<f32>,
    /// The metrics of this phase.
    pub metrics: Map<String, Value>,
}

/// The values and targets of a critic.
pub struct CriticExperience {
    /// Its values at the time of the rollout.
    pub values: Tensor,
    /// Its targets.
    pub returns: Tensor,
}

/// A KL term of the loss.
pub struct KlTerm {
    /// Its weight.
    pub coef: f64,
    /// Log-probabilities under the reference.
    pub ref_logp: Tensor,
}

/// How the rewards of a step are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shaping {
    /// Weight of the KL, in the reward or the loss.
    pub kl_coef: f64,
    /// The scale of the scores, if they are scaled.
    pub score_scale: Option<ScoreScale>,
}

impl Experience {
    /// Evaluates the rollout and estimates its advantages.
    pub fn collect(
        rollout: &Rollout,
        policy: &Decoder,
        reference: &Decoder,
        critic: Option<&Critic>,
        shaping: &Shaping,
        settings: &Settings,
    ) -> Result<Self> {
        let kl_coef = shaping.kl_coef;
        let sequences = Sequences::from(&rollout.answers.generation);
        let chunk = settings.part_size();
        let logp = |decoder: &Decoder| {
            let [logp] = in_chunks(&sequences, chunk, |some| {
                Ok([some.logp_and_entropy(decoder, settings.temperature)?.0])
            })?;
            anyhow::Ok(logp)
        };
        let policy = policy.no_grad();
        let (old_logp, log_sums) = match settings.estimator() {
            AdvantageEstimator::OptimalTokenBaseline => {
                let [logp, log_sums] = in_chunks(&sequences, chunk, |some| {
                    some.logp_and_log_sum_sq_probs(&policy, settings.temperature)
                })?;
                (logp, Some(log_sums))
            }
            _ => (logp(&policy)?, None),
        };
        let ref_logp = logp(reference)?;
        let values = match critic.map(Critic::no_grad) {
            Some(critic) => {
                let [values] = in_chunks(&sequences, chunk, |some| Ok([some.values(&critic)?]))?;
                Some(values)
            }
            None => None,
        };

        let token_kl = |estimator| {
            let options = KlOptions { estimator, ..KlOptions::default() };
            token_kl(&old_logp, &ref_logp, None, &options)
        };
        let estimated = token_kl(settings.kl_estimator())?;
        let penalty = Some(&estimated).filter(|_| settings.kl_placement() == KlPlacement::Reward);
        let mut metrics = response_metrics(rollout);
        let weights = match settings.correction_options()? {
            Some(options) => {
                let rollout_logp = &rollout.answers.generation.logp;
                let offsets = sequences.offsets()?;
                let inputs = CorrectionInputs {
                    offsets: Some(&offsets),
                    ..CorrectionInputs::new(&old_logp, rollout_logp)
                };
                let CorrectionOutput { weights, stats, .. } = correction(&inputs, &options)?;
                metrics.extend(correction_metrics(&stats.to_host()?));
                Some(weights)
            }
            None => None,
        };
        let of_tokens = OfTokens {
            old_logp: &old_logp,
            log_sums: log_sums.as_ref(),
            values: values.as_ref(),
            kl: penalty,
            weights: weights.as_ref(),
        };
        let shaped = estimate(rollout, &sequences, &of_tokens, shaping, settings)?;
        let Estimate { advantages, returns, rewards, metrics: of_groups } = shaped;
        metrics.extend(of_groups);

        // The only estimator whose sum over a response is one of the responses' KL, by which runs with
        // different penalties compare, and to which --kl-target refers.
        let k1 = match settings.kl_estimator() {
            KlEstimator::K1 => estimated.clone(),
            _ => token_kl(KlEstimator::K1)?,
        };
        let kl = sequences.sums(&k1)?;
        let mut put = |name: String, value: f64| metrics.insert(name, json!(value));
        put("objective/kl".into(), mean(&kl));
        put("objective/kl_coef".into(), kl_coef);
        let mean_of_sums = |per_token: &Tensor| anyhow::Ok(mean(&sequences.sums(per_token)?));
        put("objective/entropy".into(), -mean_of_sums(&old_logp)?);
        put("objective/rlhf_reward".into(), mean_of_sums(&rewards)?);
        let penalised = penalty.map_or(Ok(0.0), mean_of_sums)?;
        put("objective/non_score_reward".into(), -kl_coef * penalised);
        if let Some(scale) = shaping.score_scale {
            put("objective/score_std".into(), scale.std);
        }
        let critic = values.map(|values| CriticExperience { values, returns });
        if let Some(CriticExperience { values, returns }) = &critic {
            for (name, tensor) in
                [("values", values), ("returns", returns), ("advantages", &advantages)]
            {
                let all: Vec<f32> = tensor.to_vec1()?;
                put(format!("critic/{name}/mean"), mean(&all));
                put(format!("critic/{name}/min"), extreme(&all, f32::min));
                put(format!("critic/{name}/max"), extreme(&all, f32::max));
            }
        }
        let kl_term = match settings.kl_placement() {
            KlPlacement::Loss => Some(KlTerm { coef: kl_coef, ref_logp }),
            KlPlacement::Reward => None,
        };
        Ok(Self { sequences, old_logp, advantages, critic, kl_term, weights, kl, metrics })
    }
}

/// The tensors that advantages are made of besides the scores: f32 `[N]`.
struct OfTokens<'a> {
    old_logp: &'a Tensor,
    /// Logarithms of the sums of squared probabilities, for the optimal token baseline.
    log_sums: Option<&'a Tensor>,
    values: Option<&'a Tensor>,
    /// The KL that is taken off the rewards.
    kl: Option<&'a Tensor>,
    weights: Option<&'a Tensor>,
}

struct Estimate {
    advantages: Tensor,
    returns: Tensor,
    /// The rewards as shaped, before any whitening.
    rewards: Tensor,
    /// The metrics of the groups, where they are compared.
    metrics: Map<String, Value>,
}

/// Shapes the rewards, makes advantages of them, and whitens.
fn estimate(
    rollout: &Rollout,
    sequences: &Sequences,
    of_tokens: &OfTokens,
    shaping: &Shaping,
    settings: &Settings,
) -> Result<Estimate> {
    let device = sequences.ids.device();
    let (tokens, offsets) = (sequences.count_tokens(), sequences.offsets()?);
    let (scores, has_eos) = scores_of(rollout, device)?;
    let estimator = settings.estimator();
    // Without a critic the returns are sums of the rewards to come, those of a response undiscounted.
    let zeros = Tensor::zeros(tokens, DType::F32, device)?;
    let (values, lambda) =
        of_tokens.values.map_or((&zeros, 1.0), |values| (values, settings.lambda));
    let gamma = if estimator.discounts() { settings.gamma } else { 1.0 };
    let plain = GaeInputs { offsets: Some(&offsets), ..GaeInputs::new(values) };
    let shaped =
        GaeInputs { kl: of_tokens.kl, scores: Some(&scores), has_eos: Some(&has_eos), ..plain };

    let options = GaeOptions { gamma, lambda, ..GaeOptions::default() };
    let missing_eos = settings.missing_eos_penalty.map_or(MissingEos::Keep, MissingEos::Subtract);
    let shaping = RewardShaping {
        kl_coef: shaping.kl_coef,
        score_scale: shaping.score_scale,
        score_min: settings.score_clip.map_or(f64::NEG_INFINITY, |clip| -clip),
        score_max: settings.score_clip.unwrap_or(f64::INFINITY),
        missing_eos,
        ..RewardShaping::default()
    };
    let out = gae(&shaped, &GaeOptions { shaping, ..options })?;
    let rewards = out.rewards.clone();

    // One token alone has no variance to whiten by.
    let can_whiten = tokens > 1;
    let out = if settings.whiten_rewards && can_whiten {
        let scaling = WhitenOptions { shift_mean: false, ..WhitenOptions::default() };
        let scaled = masked_whiten(&rewards, None, &scaling)?;
        gae(&GaeInputs { rewards: Some(&scaled), ..plain }, &options)?
    } else {
        out
    };
    let GaeOutput { mut advantages, returns, rewards: rewards_used, moments } = out;
    let (mut moments, mut metrics) = (Some(moments), Map::new());
    if !estimator.discounts() {
        let group_size = settings.group_size();
        let scores = returns.index_select(&sequences.first_tokens()?, 0)?;
        let lengths = Tensor::new(response_lengths(rollout), device)?;
        let mask = Tensor::ones(tokens, DType::U8, device)?;
        let of_greedy = match &rollout.greedy {
            Some(greedy) => Some(score_baselines(greedy, &shaping, group_size, device)?),
            None => None,
        };
        let inputs = AdvantageInputs {
            lengths: Some(&lengths),
            score_baselines: of_greedy.as_ref(),
            mask: Some(&mask),
            offsets: Some(&offsets),
            ..AdvantageInputs::new(&scores)
        };
        // Of the token baseline for the statistics of the groups.
        let of_rows = estimator.outcome().unwrap_or_default();
        let out = outcome_advantages(&inputs, group_size, &of_rows)?;
        advantages = match of_tokens.log_sums {
            _ if estimator == AdvantageEstimator::Gdpo => {
                let parts: Vec<&[f32]> =
                    rollout.parts.iter().map(|part| &part.scores[..]).collect();
                let weights: Vec<f64> = rollout.parts.iter().map(|part| part.weight).collect();
                let each = Tensor::new(parts, device)?;
                let of_rows = gdpo(&each, &weights, None, group_size, &of_rows)?;
                // As they are, over the tokens.
                let inputs = AdvantageInputs { scores: &of_rows, score_baselines: None, ..inputs };
                let out = outcome_advantages(&inputs, 0, &AdvantageOptions::remax())?;
                out.token_advantages.expect("there is a mask")
            }
            Some(log_sums) => {
                let inputs = TokenBaselineInputs {
                    weights: of_tokens.weights,
                    offsets: Some(&offsets),
                    ..TokenBaselineInputs::new(&rewards_used, of_tokens.old_logp, log_sums)
                };
                let [advantages, _] =
                    optimal_token_baseline(&inputs, group_size, &TokenBaselineOptions::default())?;
                advantages
            }
            None => out.token_advantages.expect("there is a mask"),
        };
        let scores: Vec<f32> = scores.to_vec1()?;
        if estimator == AdvantageEstimator::MaxRl {
            let least = scores.iter().copied().fold(f32::INFINITY, f32::min);
            ensure!(
                least >= 0.0,
                "--advantages max_rl is for rewards of 0 and above, and a response has {least}"
            );
        }
        metrics = match of_greedy {
            Some(greedy) => {
                let greedy: Vec<f32> = greedy.to_vec1()?;
                named([("reward", mean(&scores)), ("greedy_reward", mean(&greedy))])
            }
            None => group_metrics(&scores, group_size, &out.stats.to_host()?),
        };
        moments = None;
    }
    if settings.whiten_advantages() && can_whiten {
        let options = WhitenOptions::default();
        advantages = match moments {
            Some(moments) => masked_whiten_with(&advantages, None, &moments, &options)?,
            None => masked_whiten(&advantages, None, &options)?,
        };
    }
    Ok(Estimate { advantages, returns, rewards, metrics })
}

/// The scores, and whether each response has ended: `[B]`.
fn scores_of(rollout: &Rollout, device: &Device) -> Result<(Tensor, Tensor)> {
    let finished = &rollout.answers.generation.finished;
    let has_eos: Vec<u8> = finished.iter().map(|&finished| u8::from(finished)).collect();
    Ok((Tensor::new(&rollout.scores[..], device)?, Tensor::new(has_eos, device)?))
}

/// The scores of greedy answers as rewards, each as often as its prompt has answers: `[B]`.
fn score_baselines(
    greedy: &Rollout,
    shaping: &RewardShaping,
    group_size: usize,
    device: &Device,
) -> Result<Tensor> {
    let (scores, has_eos) = scores_of(greedy, device)?;
    let count = greedy.scores.len();
    // Of one token, which is the last.
    let values = Tensor::zeros((count, 1), DType::F32, device)?;
    let inputs =
        GaeInputs { scores: Some(&scores), has_eos: Some(&has_eos), ..GaeInputs::new(&values) };
    let rewards = gae(&inputs, &GaeOptions { shaping: *shaping, ..GaeOptions::default() })?.rewards;
    Ok(rewards.repeat((1, group_size))?.flatten_all()?)
}

/// How the responses to a prompt differ; as TRL calls it.
fn group_metrics(rewards: &[f32], group_size: usize, stats: &AdvantageStats) -> Map<String, Value> {
    let stds =
        rewards.chunks(group_size).map(|group| RunningMoments::new().update(group).std(true));
    let groups = rewards.len() / group_size;
    named([
        ("reward", stats.score_mean),
        ("reward_std", stds.sum::<f64>() / groups as f64),
        ("frac_reward_zero_std", stats.zero_std_fraction),
    ])
}

fn response_metrics(rollout: &Rollout) -> Map<String, Value> {
    let generation = &rollout.answers.generation;
    let lengths = response_lengths(rollout);
    let num_eos = generation.finished.iter().filter(|&&finished| finished).count();
    let cut = 1.0 - num_eos as f64 / lengths.len() as f64;
    let mut metrics = named([
        ("objective/scores", mean(&rollout.scores)),
        ("val/num_eos_tokens", num_eos as f64),
        ("response_length/mean", mean(&lengths)),
        ("response_length/clip_ratio", cut),
    ]);
    if rollout.parts.len() > 1 {
        for Scores { name, scores, .. } in &rollout.parts {
            metrics.insert(format!("rewards/{name}/mean"), json!(mean(scores)));
        }
    }
    metrics
}

/// The lengths of the responses in tokens.
fn response_lengths(rollout: &Rollout) -> Vec<f32> {
    rollout.answers.generation.responses.iter().map(|response| response.len() as f32).collect()
}

/// How the rollout differs from the policy, and what the weights are; as verl and NeMo-RL call them.
fn correction_metrics(stats: &CorrectionStats) -> Map<String, Value> {
    named([
        ("rollout_corr/kl", -stats.log_ratio_sum / stats.tokens),
        ("rollout_corr/k3_kl", stats.k3_sum / stats.tokens),
        ("rollout_corr/log_ratio_abs_max", stats.log_ratio_abs_max),
        ("rollout_corr/rollout_is_mean", stats.weight_sum / stats.tokens),
        ("rollout_corr/rollout_is_max", stats.weight_max),
        ("rollout_corr/rollout_is_eff_sample_size", stats.ess),
        ("rollout_corr/rejected", stats.rejected_tokens / stats.tokens),
    ])
}

/// Metrics by their names.
pub(super) fn named<const N: usize>(metrics: [(&str, f64); N]) -> Map<String, Value> {
    metrics.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect()
}

/// Evaluates `size` sequences at a time, which bounds the memory of logits and activations.
fn in_chunks<const N: usize>(
    sequences: &Sequences,
    size: usize,
    mut evaluate: impl FnMut(&Sequences) -> Result<[Tensor; N]>,
) -> Result<[Tensor; N]> {
    let rows: Vec<usize> = (0..sequences.len()).collect();
    let parts: Vec<[Tensor; N]> = (rows.chunks(size))
        .map(|rows| evaluate(&sequences.select(rows)?))
        .collect::<Result<_>>()?;
    let joined = |k| Tensor::cat(&parts.iter().map(|part| &part[k]).collect::<Vec<_>>(), 0);
    let joined: Vec<Tensor> = (0..N).map(joined).collect::<candle_core::Result<_>>()?;
    Ok(joined.try_into().expect("N of them"))
}

/// The mean of f32 values, in f64.
pub(super) fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64
}

fn extreme(values: &[f32], of: fn(f32, f32) -> f32) -> f64 {
    values.iter().copied().reduce(of).map_or(f64::NAN, f64::from)
}
