//! The candle functions. One pass makes every output of a row at once, and a node of candle's graph
//! has one output: `[4, N]`, of which the caller sees the first one or two.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    cpu, BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs, LogprobOptions, OP,
};
use crate::cpu::{Logit, RowsMut};
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::tensor::OnCuda;
use crate::tensor::{
    check_arg, leading_and_vocab, node, row, run, with_logits, Backend, Buffer, Held, OnCpu, Owned,
};

/// Rows of the node's output: log-probability, entropy, and what backward needs to know of a row, its
/// maximum and the logarithm of its sum.
const LOGP: usize = 0;
const ENTROPY: usize = 1;
const MAX: usize = 2;
const LOG_SUM: usize = 3;
const OUTPUTS: usize = 4;

/// Log-probabilities of the targets: f32, of the targets' shape.
///
/// `logits` is `[.., V]` in f32, f16 or bf16, and takes the gradient; `targets` is `[..]` in u32 or
/// i64. See [the module](super) for formula and special values.
///
/// # Errors
/// If a shape, dtype or device does not fit, an option is out of range, or a target is outside the
/// vocabulary; on CUDA its row is NaN instead.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::logprob::{logprobs, LogprobOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let logits = Tensor::new(&[[0f32, 1.0, 2.0], [5.0, 5.0, 5.0]], &Device::Cpu)?;
/// let targets = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let logp = logprobs(&logits, &targets, &LogprobOptions::default())?;
/// assert!((logp.to_vec1::<f32>()?[1] - (1f32 / 3.0).ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn logprobs(logits: &Tensor, targets: &Tensor, options: &LogprobOptions) -> Result<Tensor> {
    let outputs = apply(logits, targets, options, false)?;
    Ok(row(&outputs, LOGP)?.reshape(targets.dims())?)
}

/// Log-probabilities of the targets and entropies of the rows, from one pass over the logits; both
/// f32, of the targets' shape, and both with gradient to the logits.
///
/// # Errors
/// As [`logprobs`].
pub fn logprobs_and_entropy(
    logits: &Tensor,
    targets: &Tensor,
    options: &LogprobOptions,
) -> Result<(Tensor, Tensor)> {
    let outputs = apply(logits, targets, options, true)?;
    let output = |i| row(&outputs, i)?.reshape(targets.dims());
    Ok((output(LOGP)?, output(ENTROPY)?))
}

fn apply(
    logits: &Tensor,
    targets: &Tensor,
    options: &LogprobOptions,
    entropy: bool,
) -> Result<Tensor> {
    options.validate()?;
    let (leading, vocab) = leading_and_vocab(OP, "logits", logits)?;
    let ids = [DType::U32, DType::I64];
    check_arg(OP, "targets", targets, leading, &ids, logits.device())?;

    let targets = targets.detach().to_dtype(DType::I64)?.contiguous()?;
    let pass = Pass { rows: targets.elem_count(), vocab, options: *options, entropy };
    with_logits!(logits, T => pass.apply::<T>(logits, targets))
}

/// The parameters of both passes besides their lists.
struct Pass {
    rows: usize,
    vocab: usize,
    options: LogprobOptions,
    entropy: bool,
}

impl Pass {
    /// `[OUTPUTS, N]`, a function of the logits.
    fn apply<T: Logit>(self, logits: &Tensor, targets: Tensor) -> Result<Tensor> {
        // In their own shape: of a reshape candle would make a pass of its own over the gradient.
        let constant = logits.detach().contiguous()?;
        let inputs = ForwardInputs::<Owned, T, i64> { logits: constant, targets };
        let outputs = self.forward(&inputs)?;
        let shape = (OUTPUTS, self.rows);
        node("ppo-logprob", &[logits], outputs, shape, move |outputs, grad| {
            let inputs = BackwardInputs {
                forward: inputs.clone(),
                max: row(outputs, MAX)?,
                log_sum: row(outputs, LOG_SUM)?,
                entropy: self.entropy.then(|| row(outputs, ENTROPY)).transpose()?,
                grad_logp: Some(row(grad, LOGP)?),
                grad_entropy: self.entropy.then(|| row(grad, ENTROPY)).transpose()?,
            };
            Ok(vec![Some(self.backward(&inputs)?)])
        })
    }

    fn forward<T: Logit>(&self, inputs: &ForwardInputs<Owned, T, i64>) -> Result<Buffer<f32>> {
        let Self { rows, vocab, ref options, .. } = *self;
        let backend = Backend::of(OP, "logits", inputs.logits.device())?;
        let views = inputs.try_map((&[rows], vocab), &mut Held(OP))?;
        let mut buffer = backend.buffer(OUTPUTS * rows)?;
        let order = [LOGP, ENTROPY, MAX, LOG_SUM];
        match &backend {
            Backend::Cpu => {
                let Ok(inputs) = views.try_map((&[rows], vocab), &mut OnCpu);
                let parts = RowsMut { data: buffer.cpu(), width: rows };
                let [logp, entropy, max, log_sum] = parts.disjoint(order);
                let entropy = self.entropy.then_some(entropy);
                let (max, log_sum) = (Some(max), Some(log_sum));
                let outputs = ForwardOutputs { logp, entropy, max, log_sum };
                cpu::forward(inputs, rows, vocab, options, outputs)?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let Ok(inputs) = views.try_map((&[rows], vocab), &mut OnCuda);
                let [logp, entropy, max, log_sum] = buffer.cuda().disjoint(rows, order);
                let entropy = self.entropy.then_some(entropy);
                let (max, log_sum) = (Some(max), Some(log_sum));
                let outputs = ForwardOutputs { logp, entropy, max, log_sum };
                let stream = backend.stream()?;
                cuda::forward(&stream, inputs, rows, vocab, options, outputs)?;
            }
        }
        Ok(buffer)
    }

    /// The logits' gradient.
    fn backward<T: Logit>(&self, inputs: &BackwardInputs<Owned, T, i64>) -> Result<Tensor> {
        let Self { rows, vocab, ref options, .. } = *self;
        let logits = &inputs.forward.logits;
        let backend = Backend::of(OP, "logits", logits.device())?;
        let grad_logits = backend.buffer(logits.elem_count())?;
        let mut buffers = BackwardOutputs::<Owned, T> { grad_logits };
        run!(
            (OP, backend),
            [inputs, (&[rows], vocab)],
            [buffers, (&[rows], vocab)],
            |i, o| cpu::backward(i, rows, vocab, options, o),
            |stream| cuda::backward(stream, i, rows, vocab, options, o),
        );
        Ok(buffers.grad_logits.into_tensor(logits.shape()))
    }
}
