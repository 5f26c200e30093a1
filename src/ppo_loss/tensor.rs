//! The candle function. Loss, statistics and gradients are made at once, in one pass. The loss is the
//! output of a node of candle's graph, whose backward only scales the gradients that are there.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    cpu, Inputs, LossShape, Outputs, PpoLossOptions, PpoStats, ScaleInputs, ScaleOutputs, OP,
};
use crate::error::Result;
use crate::memory::Tensors;
use crate::pack::BatchShape;
use crate::tensor::{
    batch_and_seq_len, check_dtype, node, run, Backend, Constants, Owned, StatsTensor,
};

/// The inputs of [`ppo_loss`] as tensors.
pub type PpoLossInputs<'a> = Inputs<'a, Tensors>;

/// The results of [`ppo_loss`].
#[derive(Debug, Clone)]
pub struct PpoLossOutput {
    /// The loss, a scalar f32 with gradient to logp, values and entropy.
    pub loss: Tensor,
    /// The statistics, on the device of the inputs.
    pub stats: PpoStatsTensor,
}

/// The statistics where they were computed, so that nobody has to wait for them.
pub type PpoStatsTensor = StatsTensor<PpoStats>;

/// The PPO loss with its statistics. See [the module](super) for the formula.
///
/// # Errors
/// If a shape, dtype or device does not fit, an option is out of range or asks for an input that is
/// missing, or no token is unmasked and the denominator is not given. To look for one on CUDA would
/// cost a wait for the device: the loss is NaN there, with gradients of 0.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use ppo_kernels::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let logp = Var::new(&[[-1.0_f32, -2.0]], &Device::Cpu)?;
/// let old_logp = Tensor::new(&[[-1.0_f32, -3.0]], &Device::Cpu)?;
/// let advantages = Tensor::new(&[[1.0_f32, 1.0]], &Device::Cpu)?;
/// let inputs = PpoLossInputs::new(&logp, &old_logp, &advantages);
/// let output = ppo_loss(&inputs, &PpoLossOptions::default())?;
/// let grads = output.loss.backward()?;
/// // The second token's ratio is e, beyond 1.2: no gradient.
/// assert_eq!(grads.get(&logp).unwrap().to_vec2::<f32>()?, [[-0.5, 0.0]]);
/// assert_eq!(output.stats.to_host()?.clip_fraction, 0.5);
/// # Ok(())
/// # }
/// ```
pub fn ppo_loss(inputs: &PpoLossInputs, options: &PpoLossOptions) -> Result<PpoLossOutput> {
    let logp = inputs.logp;
    check_dtype(OP, "logp", logp, &[DType::F32])?;
    let [batch, seq_len] = batch_and_seq_len(OP, "logp", logp, inputs.offsets)?;
    let (shape, tokens) =
        (BatchShape::new(batch, seq_len, inputs.offsets.is_some()), logp.elem_count());
    let backend = Backend::of(OP, "logp", logp.device())?;
    let of_inputs = LossShape::new(shape, options);
    let tensors = inputs.try_map(of_inputs, &mut Constants::new(OP, logp.device()))?;

    // An entropy that is only reported gets no gradient.
    let entropy = inputs.entropy.filter(|_| options.entropy_coef != 0.0);
    let args = [Some(logp), inputs.values, entropy];
    let args = args.map(|arg| arg.filter(|arg| arg.track_op()));
    let [grad_logp, grad_values, grad_entropy] =
        args.map(|arg| backend.optional_buffer(arg.is_some(), tokens));
    let mut buffers = Outputs::<Owned> {
        stats: backend.buffer(1)?,
        loss: Some(backend.buffer(1)?),
        grad_logp: grad_logp?,
        grad_values: grad_values?,
        grad_entropy: grad_entropy?,
    };
    run!(
        (OP, backend),
        [tensors, of_inputs],
        [buffers, shape],
        |i, o| cpu::ppo_loss(i, batch, seq_len, options, o),
        |stream, w = [cuda::workspace_len(batch, tokens, options)]| {
            cuda::ppo_loss(stream, i, batch, seq_len, options, o, w)
        },
    );
    let Outputs { stats, loss, grad_logp, grad_values, grad_entropy } = buffers;
    let stored = [grad_logp, grad_values, grad_entropy];
    let stored = stored.map(|gradient| Some(gradient?.into_tensor(logp.shape())));
    let dims = logp.dims().to_vec();
    let args: Vec<&Tensor> = args.into_iter().flatten().collect();
    let loss = node("ppo-loss", &args, loss.expect("asked for"), (), move |_, upstream| {
        scaled(&stored, upstream, &dims)
    })?;
    Ok(PpoLossOutput { loss, stats: StatsTensor::from_buffer(stats)? })
}

/// The gradients of this shape that are stored, times that of the loss, a scalar.
pub(crate) fn scaled(
    [logp, values, entropy]: &[Option<Tensor>; 3],
    upstream: &Tensor,
    shape: &[usize],
) -> Result<Vec<Option<Tensor>>> {
    let backend = Backend::of(OP, "upstream", upstream.device())?;
    let tokens = shape.iter().product();
    let tensors = ScaleInputs::<Owned> {
        upstream: upstream.clone(),
        stored_logp: logp.clone(),
        stored_values: values.clone(),
        stored_entropy: entropy.clone(),
    };
    let mut buffers = ScaleOutputs::<Owned> {
        grad_logp: backend.optional_buffer(logp.is_some(), tokens)?,
        grad_values: backend.optional_buffer(values.is_some(), tokens)?,
        grad_entropy: backend.optional_buffer(entropy.is_some(), tokens)?,
    };
    run!(
        (OP, backend),
        [tensors, tokens],
        [buffers, tokens],
        |i, o| cpu::scale(i, tokens, o),
        |stream| cuda::scale(stream, i, tokens, o),
    );
    let ScaleOutputs { grad_logp, grad_values, grad_entropy } = buffers;
    let gradients = [grad_logp, grad_values, grad_entropy].into_iter().flatten();
    Ok(gradients.map(|gradient| Some(gradient.into_tensor(shape))).collect())
}
