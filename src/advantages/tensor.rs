//! The candle functions.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    cpu, AdvantageOptions, AdvantageStats, Baseline, Inputs, Outputs, Scale, Sizes,
    TokenBaselineOptions, TokenInputs, TokenOutputs, OP,
};
use crate::error::{Error, Result};
use crate::memory::Tensors;
use crate::tensor::{batch_and_seq_len, check_dtype, run, Backend, Constants, Owned};

/// The inputs of [`outcome_advantages`] as tensors.
pub type AdvantageInputs<'a> = Inputs<'a, Tensors>;

/// The results of [`outcome_advantages`]; constants to the gradient.
#[derive(Debug, Clone)]
pub struct AdvantageOutput {
    /// Advantages of the rows, `[B]` in f32.
    pub advantages: Tensor,
    /// The advantages on the rows' unmasked tokens, `[B, T]` in f32, or `[N]` of a pack, where there is a mask.
    pub token_advantages: Option<Tensor>,
    /// Statistics of the scores, on the device of the inputs.
    pub stats: AdvantageStatsTensor,
}

/// The statistics where they were computed, so that nobody has to wait for them.
#[derive(Debug, Clone)]
pub struct AdvantageStatsTensor(Tensor);

impl AdvantageStatsTensor {
    /// f64 `[AdvantageStats::LEN]`, in the order of the fields.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }

    /// Brings them to the host, which waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<AdvantageStats> {
        Ok(bytemuck::cast_slice(&self.0.to_vec1::<f64>()?)[0])
    }
}

/// Advantages of a batch of sequences from one score each, and where a mask is given those of its tokens. See
/// [the module](super) for formula, groups and the meaning of the inputs; `group_size` is 0 where `groups` is
/// given, or nothing is asked of groups. Offsets need a mask.
///
/// # Errors
/// If a shape, dtype or device does not fit, an option is out of range, or what it looks at is not there.
/// To look for groups of one on CUDA would cost a wait for the device: with [`Baseline::RunnerUp`] their rows
/// come out as NaN there.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::advantages::{outcome_advantages, AdvantageInputs, AdvantageOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let scores = Tensor::new(&[1f32, 0.0, 0.0, 0.5, 0.5], &Device::Cpu)?;
/// let groups = Tensor::new(&[7i64, 7, 7, -2, -2], &Device::Cpu)?;
/// let inputs = AdvantageInputs { groups: Some(&groups), ..AdvantageInputs::new(&scores) };
/// let out = outcome_advantages(&inputs, 0, &AdvantageOptions::rloo())?;
/// assert_eq!(out.advantages.to_vec1::<f32>()?, [1.0, -0.5, -0.5, 0.0, 0.0]);
/// assert_eq!(out.stats.to_host()?.zero_std_fraction, 0.5);
/// # Ok(())
/// # }
/// ```
pub fn outcome_advantages(
    inputs: &AdvantageInputs,
    group_size: usize,
    options: &AdvantageOptions,
) -> Result<AdvantageOutput> {
    let scores = inputs.scores;
    check_dtype(OP, "scores", scores, &[DType::F32])?;
    let &[batch] = scores.dims() else {
        let (expected, got) = ("[B]".into(), format!("{:?}", scores.dims()));
        return Err(Error::Shape { op: OP, arg: "scores", expected, got });
    };
    let given = [inputs.offsets.is_some(), inputs.mask.is_some()];
    Error::check_given(OP, ["offsets", "mask"], given)?;
    let seq_len = match inputs.mask {
        Some(mask) => batch_and_seq_len(OP, "mask", mask, inputs.offsets)?[1],
        None => 0,
    };
    let sizes = Sizes { batch, seq_len, group_size };
    let backend = Backend::of(OP, "scores", scores.device())?;
    let shape = sizes.shape(inputs.offsets.is_some());
    let tensors = inputs.try_map(shape, &mut Constants::new(OP, scores.device()))?;
    let mut buffers = Outputs::<Owned> {
        advantages: backend.buffer(batch)?,
        token_advantages: backend.optional_buffer(inputs.mask.is_some(), shape.count_tokens())?,
        stats: Some(backend.buffer(1)?),
    };
    run!(
        (OP, backend),
        [tensors, shape],
        [buffers, shape],
        |i, o| cpu::outcome_advantages(i, sizes, options, o),
        |stream, w = [cuda::workspace_len(batch)]| {
            cuda::outcome_advantages(stream, i, sizes, options, o, w)
        },
    );
    let Outputs { advantages, token_advantages, stats } = buffers;
    let stats = stats.expect("asked for").into_tensor(AdvantageStats::LEN);
    Ok(AdvantageOutput {
        advantages: advantages.into_tensor(batch),
        token_advantages: token_advantages.map(|tokens| tokens.into_tensor(shape.tokens())),
        stats: AdvantageStatsTensor(stats),
    })
}

/// GDPO: advantages from several rewards `[K, B]`, each normalised by itself with `options`; their sum with
/// these weights is normalised over the batch, with the same eps (TRL's `normalize_then_sum`). verl's GDPO
/// has [`masked_whiten`](crate::whiten::masked_whiten) over tokens in the place of that last step.
///
/// A row without any reward, all being NaN, is left out of the batch, and its advantage is 0. `groups` is
/// `[B]`, or `group_size` not 0.
///
/// # Errors
/// As [`outcome_advantages`]; and if there are not as many weights as rewards.
pub fn gdpo(
    rewards: &Tensor,
    weights: &[f64],
    groups: Option<&Tensor>,
    group_size: usize,
    options: &AdvantageOptions,
) -> Result<Tensor> {
    let [count, batch] = batch_and_seq_len(OP, "rewards", rewards, None)?;
    Error::check_len(OP, "weights", weights.len(), count)?;
    let mut total = Tensor::zeros(batch, DType::F32, rewards.device())?;
    let mut missing = total.clone();
    for (k, &weight) in weights.iter().enumerate() {
        let scores = rewards.get(k)?;
        let inputs = AdvantageInputs { groups, ..AdvantageInputs::new(&scores) };
        let of_one = outcome_advantages(&inputs, group_size, options)?.advantages;
        total = (total + (of_one * weight)?)?;
        // NaN is the one number that is not itself.
        missing = (missing + scores.ne(&scores)?.to_dtype(DType::F32)?)?;
    }
    let none = missing.eq(count as f64)?;
    let nan = Tensor::full(f32::NAN, batch, rewards.device())?;
    let total = none.where_cond(&nan, &total)?;
    let over_batch = AdvantageOptions {
        eps: options.eps,
        ..AdvantageOptions::of(Baseline::Batch, Scale::Batch)
    };
    Ok(outcome_advantages(&AdvantageInputs::new(&total), 0, &over_batch)?.advantages)
}

/// The inputs of [`optimal_token_baseline`] as tensors.
pub type TokenBaselineInputs<'a> = TokenInputs<'a, Tensors>;

/// Advantages of tokens against verl's optimal token baseline, and returns: f32 `[B, T]`, or `[N]` of a pack, 0
/// where masked, constants to the gradient. See [the module](super) for formula, groups and the meaning of the
/// inputs; `group_size` is 0 where `groups` is given.
///
/// # Errors
/// If a shape, dtype or device does not fit, an option is out of range, or rows are in no groups.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::advantages::{optimal_token_baseline, TokenBaselineInputs};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// // Two answers of two tokens; of the whole vocabulary p is 1/2 and 1/2.
/// let rewards = Tensor::new(&[[0f32, 1.0], [0.0, 0.0]], &Device::Cpu)?;
/// let logp = Tensor::full(0.5f32.ln(), (2, 2), &Device::Cpu)?;
/// let inputs = TokenBaselineInputs::new(&rewards, &logp, &logp);
/// let [advantages, returns] = optimal_token_baseline(&inputs, 2, &Default::default())?;
/// assert_eq!(returns.to_vec2::<f32>()?, [[1.0, 1.0], [0.0, 0.0]]);
/// assert_eq!(advantages.to_vec2::<f32>()?, [[0.5, 0.5], [-0.5, -0.5]]);
/// # Ok(())
/// # }
/// ```
pub fn optimal_token_baseline(
    inputs: &TokenBaselineInputs,
    group_size: usize,
    options: &TokenBaselineOptions,
) -> Result<[Tensor; 2]> {
    let rewards = inputs.rewards;
    check_dtype(OP, "rewards", rewards, &[DType::F32])?;
    let [batch, seq_len] = batch_and_seq_len(OP, "rewards", rewards, inputs.offsets)?;
    let sizes = Sizes { batch, seq_len, group_size };
    let shape = sizes.shape(inputs.offsets.is_some());
    let backend = Backend::of(OP, "rewards", rewards.device())?;
    let tensors = inputs.try_map(shape, &mut Constants::new(OP, rewards.device()))?;
    let tokens = shape.count_tokens();
    let mut buffers = TokenOutputs::<Owned> {
        advantages: backend.buffer(tokens)?,
        returns: Some(backend.buffer(tokens)?),
    };
    run!(
        (OP, backend),
        [tensors, shape],
        [buffers, shape],
        |i, o| cpu::optimal_token_baseline(i, sizes, options, o),
        |stream, w = [cuda::token_workspace_len(batch, tokens)]| {
            cuda::optimal_token_baseline(stream, i, sizes, options, o, w)
        },
    );
    let TokenOutputs { advantages, returns } = buffers;
    Ok([advantages, returns.expect("asked for")].map(|each| each.into_tensor(shape.tokens())))
}
