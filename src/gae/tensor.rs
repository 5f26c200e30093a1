//! The candle function.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, GaeOptions, Inputs, Outputs, OP};
use crate::error::Result;
use crate::memory::Tensors;
use crate::moments::MomentsTensor;
use crate::pack::BatchShape;
use crate::tensor::{batch_and_seq_len, check_dtype, run, Backend, Constants, Owned};

/// The inputs of [`gae`] as tensors.
pub type GaeInputs<'a> = Inputs<'a, Tensors>;

/// The results of [`gae`]. The tensors are `[B, T]` in f32, or `[N]` of a pack, 0 where masked, and constants to the
/// gradient.
#[derive(Debug, Clone)]
pub struct GaeOutput {
    /// Advantages, not whitened.
    pub advantages: Tensor,
    /// Returns: the targets of the value function.
    pub returns: Tensor,
    /// The rewards after shaping.
    pub rewards: Tensor,
    /// Moments of the unmasked advantages, to whiten them by.
    pub moments: MomentsTensor,
}

/// Advantages and returns of a batch of token sequences, with the shaping of the rewards in the same
/// pass. See [the module](super) for formula, masks and the meaning of the inputs.
///
/// # Errors
/// If a shape, dtype or device does not fit, an option is out of range, or
/// [`MissingEos`](super::MissingEos) has no `scores` and `has_eos` to work on.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::gae::{gae, GaeInputs, GaeOptions};
/// use ppo_kernels::whiten::{masked_whiten_with, WhitenOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let values = Tensor::new(&[[0.5f32, 0.25, f32::NAN]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1u8, 1, 0]], &Device::Cpu)?;
/// let scores = Tensor::new(&[1f32], &Device::Cpu)?;
/// let inputs =
///     GaeInputs { scores: Some(&scores), mask: Some(&mask), ..GaeInputs::new(&values) };
/// let out = gae(&inputs, &GaeOptions { lambda: 1.0, ..Default::default() })?;
/// assert_eq!(out.advantages.to_vec2::<f32>()?, [[0.5, 0.75, 0.0]]);
/// assert_eq!(out.returns.to_vec2::<f32>()?, [[1.0, 1.0, 0.0]]);
///
/// let options = WhitenOptions::default();
/// let whitened = masked_whiten_with(&out.advantages, Some(&mask), &out.moments, &options)?;
/// # let _ = whitened;
/// # Ok(())
/// # }
/// ```
pub fn gae(inputs: &GaeInputs, options: &GaeOptions) -> Result<GaeOutput> {
    let values = inputs.values;
    check_dtype(OP, "values", values, &[DType::F32])?;
    let [batch, seq_len] = batch_and_seq_len(OP, "values", values, inputs.offsets)?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let backend = Backend::of(OP, "values", values.device())?;
    let tensors = inputs.try_map(shape, &mut Constants::new(OP, values.device()))?;
    let buffer = || backend.buffer(values.elem_count());
    let mut buffers = Outputs::<Owned> {
        advantages: buffer()?,
        returns: buffer()?,
        shaped_rewards: Some(buffer()?),
        moments: Some(backend.buffer(1)?),
    };
    run!(
        (OP, backend),
        [tensors, shape],
        [buffers, shape],
        |i, o| cpu::gae(i, batch, seq_len, options, o),
        |stream, w = [cuda::workspace_len(&tensors, batch, seq_len)]| {
            cuda::gae(stream, i, batch, seq_len, options, o, w)
        },
    );
    let Outputs { advantages, returns, shaped_rewards, moments } = buffers;
    Ok(GaeOutput {
        advantages: advantages.into_tensor(values.shape()),
        returns: returns.into_tensor(values.shape()),
        rewards: shaped_rewards.expect("asked for").into_tensor(values.shape()),
        moments: MomentsTensor::from_buffer(moments.expect("asked for")),
    })
}
