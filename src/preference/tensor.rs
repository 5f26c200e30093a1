//! The candle functions. Loss, statistics and gradient are made at once. The loss is the output of a node of
//! candle's graph, whose backward only scales the gradient that is there.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    cpu, Inputs, Outputs, PreferenceOptions, PreferenceStats, RewardModelInputs,
    RewardModelOptions, RewardModelOutputs, OP,
};
use crate::error::{Error, Result};
use crate::memory::Tensors;
use crate::pack::BatchShape;
use crate::ppo_loss::scaled;
use crate::tensor::{
    batch_and_seq_len, check_dtype, node, run, Backend, Buffer, Constants, Owned, StatsTensor,
};

/// The inputs of [`preference_loss`] as tensors.
pub type PreferenceInputs<'a> = Inputs<'a, Tensors>;

/// The inputs of [`reward_model_loss`] as tensors.
pub type RewardModelTensors<'a> = RewardModelInputs<'a, Tensors>;

/// The statistics where they were computed, so that nobody has to wait for them.
pub type PreferenceStatsTensor = StatsTensor<PreferenceStats>;

/// The results of [`preference_loss`].
#[derive(Debug, Clone)]
pub struct PreferenceOutput {
    /// The loss, a scalar f32 with gradient to logp.
    pub loss: Tensor,
    /// The losses of the units, times their weights, f32 `[units]`; constants.
    pub losses: Tensor,
    /// Implicit rewards, f32 `[rows]`; constants.
    pub rewards: Tensor,
    /// The statistics, on the device of the inputs.
    pub stats: PreferenceStatsTensor,
}

/// A preference loss with its statistics. See [the module](super) for the formula. `logp` is `[rows, T]`;
/// log-probabilities of whole responses are `[rows, 1]`.
///
/// # Errors
/// If a shape, dtype or device does not fit, the rows are no pairs, an option is out of range, something is
/// given that does not go with the loss, or, on the CPU, where looking costs no wait, a label is neither 0
/// nor 1, or no pair counts and the denominator is not given. The loss is NaN for these on CUDA.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use ppo_kernels::preference::{preference_loss, PreferenceInputs, PreferenceOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// // A chosen response of three tokens and a rejected one of two.
/// let logp = Var::new(&[[-1.0_f32, -1.0, -2.0], [-2.0, -3.0, 0.0]], &Device::Cpu)?;
/// let ref_sums = Tensor::new(&[-4.0_f32, -5.0], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1_u8, 1, 1], [1, 1, 0]], &Device::Cpu)?;
/// let inputs = PreferenceInputs {
///     ref_sums: Some(&ref_sums),
///     mask: Some(&mask),
///     ..PreferenceInputs::new(&logp)
/// };
/// let output = preference_loss(&inputs, &PreferenceOptions { beta: 0.5, ..Default::default() })?;
/// let grads = output.loss.backward()?;
/// // No log-ratio so far: the gradient of -ls(0) is half of beta.
/// assert_eq!(
///     grads.get(&logp).unwrap().to_vec2::<f32>()?,
///     [[-0.25, -0.25, -0.25], [0.25, 0.25, 0.0]]
/// );
/// assert_eq!(output.stats.to_host()?.chosen_logp, -4.0);
/// # Ok(())
/// # }
/// ```
pub fn preference_loss(
    inputs: &PreferenceInputs,
    options: &PreferenceOptions,
) -> Result<PreferenceOutput> {
    let logp = inputs.logp;
    check_dtype(OP, "logp", logp, &[DType::F32])?;
    let [rows, seq_len] = batch_and_seq_len(OP, "logp", logp, inputs.offsets)?;
    let units = options.units(rows)?;
    let shape = (BatchShape::new(rows, seq_len, inputs.offsets.is_some()), units);
    let backend = Backend::of(OP, "logp", logp.device())?;
    let tensors = inputs.try_map(shape, &mut Constants::new(OP, logp.device()))?;
    let mut buffers = Outputs::<Owned> {
        stats: backend.buffer(1)?,
        loss: Some(backend.buffer(1)?),
        losses: Some(backend.buffer(units)?),
        rewards: Some(backend.buffer(rows)?),
        grad_logp: backend.optional_buffer(logp.track_op(), logp.elem_count())?,
    };
    run!(
        (OP, backend),
        [tensors, shape],
        [buffers, shape],
        |i, o| cpu::preference_loss(i, rows, seq_len, options, o),
        |stream, w = [cuda::workspace_len(rows, options)]| {
            cuda::preference_loss(stream, i, rows, seq_len, options, o, w)
        },
    );
    let Outputs { stats, loss, losses, rewards, grad_logp } = buffers;
    Ok(PreferenceOutput {
        loss: tied(logp, loss.expect("asked for"), grad_logp)?,
        losses: losses.expect("asked for").into_tensor(units),
        rewards: rewards.expect("asked for").into_tensor(rows),
        stats: StatsTensor::from_buffer(stats)?,
    })
}

/// The results of [`reward_model_loss`].
#[derive(Debug, Clone)]
pub struct RewardModelOutput {
    /// The loss, a scalar f32 with gradient to the rewards.
    pub loss: Tensor,
    /// The losses of the pairs, times their weights, f32 `[pairs]`; constants.
    pub losses: Tensor,
    /// The statistics, on the device of the inputs.
    pub stats: PreferenceStatsTensor,
}

/// The pairwise loss of a reward model with its statistics: the mean of
/// -ls(chosen - rejected - margin) + center_coef (chosen + rejected)². `rewards` is `[2, pairs]`.
///
/// # Errors
/// As [`preference_loss`].
pub fn reward_model_loss(
    inputs: &RewardModelTensors,
    options: &RewardModelOptions,
) -> Result<RewardModelOutput> {
    let rewards = inputs.rewards;
    check_dtype(OP, "rewards", rewards, &[DType::F32])?;
    let Ok([2, pairs]) = <[usize; 2]>::try_from(rewards.dims()) else {
        let (expected, got) = ("[2, pairs]".into(), format!("{:?}", rewards.dims()));
        return Err(Error::Shape { op: OP, arg: "rewards", expected, got });
    };
    let backend = Backend::of(OP, "rewards", rewards.device())?;
    let tensors = inputs.try_map(pairs, &mut Constants::new(OP, rewards.device()))?;
    let mut buffers = RewardModelOutputs::<Owned> {
        stats: backend.buffer(1)?,
        loss: Some(backend.buffer(1)?),
        losses: Some(backend.buffer(pairs)?),
        grad_rewards: backend.optional_buffer(rewards.track_op(), 2 * pairs)?,
    };
    run!(
        (OP, backend),
        [tensors, pairs],
        [buffers, pairs],
        |i, o| cpu::reward_model_loss(i, pairs, options, o),
        |stream, w = [cuda::reward_model_workspace_len(pairs)]| {
            cuda::reward_model_loss(stream, i, pairs, options, o, w)
        },
    );
    let RewardModelOutputs { stats, loss, losses, grad_rewards } = buffers;
    Ok(RewardModelOutput {
        loss: tied(rewards, loss.expect("asked for"), grad_rewards)?,
        losses: losses.expect("asked for").into_tensor(pairs),
        stats: StatsTensor::from_buffer(stats)?,
    })
}

/// The loss as a function of the tensor that its stored gradient is of.
fn tied(of: &Tensor, loss: Buffer<f32>, gradient: Option<Buffer<f32>>) -> Result<Tensor> {
    let dims = of.dims().to_vec();
    let stored = [gradient.map(|gradient| gradient.into_tensor(of.shape())), None, None];
    let args: &[&Tensor] = if stored[0].is_some() { &[of] } else { &[] };
    node("ppo-preference", args, loss, (), move |_, upstream| scaled(&stored, upstream, &dims))
}
