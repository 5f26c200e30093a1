//! The candle function.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, CorrectionOptions, CorrectionStats, Inputs, Outputs, OP};
use crate::error::Result;
use crate::memory::Tensors;
use crate::pack::BatchShape;
use crate::tensor::{batch_and_seq_len, check_dtype, run, Backend, Constants, Owned, StatsTensor};

/// The inputs of [`correction`] as tensors.
pub type CorrectionInputs<'a> = Inputs<'a, Tensors>;

/// The statistics where they were computed, so that nobody has to wait for them.
pub type CorrectionStatsTensor = StatsTensor<CorrectionStats>;

/// The results of [`correction`]: constants to the gradient.
#[derive(Debug, Clone)]
pub struct CorrectionOutput {
    /// Weights, f32 `[B, T]`, or `[N]` of a pack, 0 where masked or rejected: [`ppo_loss`](crate::ppo_loss::ppo_loss)'s input
    /// `weights`.
    pub weights: Tensor,
    /// The mask without what is rejected, u8 `[B, T]`.
    pub kept: Tensor,
    /// The statistics, on the device of the inputs.
    pub stats: CorrectionStatsTensor,
}

/// Importance weights that correct for a rollout by another engine than the trainer's, with rejections and
/// statistics. See [the module](super) for the formula.
///
/// # Errors
/// If a shape, dtype or device does not fit, or an option is out of range.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::correction::{correction, CorrectionInputs, CorrectionOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let old_logp = Tensor::new(&[[-1.0_f32, -0.5, -2.0]], &Device::Cpu)?;
/// let rollout_logp = Tensor::new(&[[-1.0_f32, -1.5, f32::NAN]], &Device::Cpu)?;
/// let inputs = CorrectionInputs::new(&old_logp, &rollout_logp);
/// // The second token's ratio is e, truncated at 2.
/// let out = correction(&inputs, &CorrectionOptions::tis(2.0))?;
/// assert_eq!(out.weights.to_vec2::<f32>()?, [[1.0, 2.0, 1.0]]);
/// assert_eq!(out.stats.to_host()?.above_tokens, 1.0);
/// let out = correction(&inputs, &CorrectionOptions::icepop(0.5, 2.0))?;
/// assert_eq!(out.weights.to_vec2::<f32>()?, [[1.0, 0.0, 1.0]]);
/// # Ok(())
/// # }
/// ```
pub fn correction(
    inputs: &CorrectionInputs,
    options: &CorrectionOptions,
) -> Result<CorrectionOutput> {
    let old_logp = inputs.old_logp;
    check_dtype(OP, "old_logp", old_logp, &[DType::F32])?;
    let [batch, seq_len] = batch_and_seq_len(OP, "old_logp", old_logp, inputs.offsets)?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let backend = Backend::of(OP, "old_logp", old_logp.device())?;
    let tensors = inputs.try_map(shape, &mut Constants::new(OP, old_logp.device()))?;
    let tokens = old_logp.elem_count();
    let mut buffers = Outputs::<Owned> {
        weights: backend.buffer(tokens)?,
        stats: backend.buffer(1)?,
        kept: Some(backend.buffer(tokens)?),
    };
    run!(
        (OP, backend),
        [tensors, shape],
        [buffers, shape],
        |i, o| cpu::correction(i, batch, seq_len, options, o),
        |stream, w = [cuda::workspace_len(batch)]| {
            cuda::correction(stream, i, batch, seq_len, options, o, w)
        },
    );
    let Outputs { weights, stats, kept } = buffers;
    Ok(CorrectionOutput {
        weights: weights.into_tensor(old_logp.shape()),
        kept: kept.expect("asked for").into_tensor(old_logp.shape()),
        stats: StatsTensor::from_buffer(stats)?,
    })
}
