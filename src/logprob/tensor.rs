//! The candle functions. One pass makes every output of a row at once, and a node of candle's graph
//! has one output: `[4, N]`, of which the caller sees the first one or two.

use candle_core::{DType, Tensor};
use half::{bf16, f16};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, LogprobOptions, OP};
use crate::cpu::Logit;
use crate::error::{Error, Result};
use crate::memory::Element;
use crate::tensor::{check_arg, check_dtype, node, parts, parts_mut, view, Backend, Buffer};

/// Rows of the node's output, and their order: log-probability, entropy, and what backward needs to
/// know of a row, its maximum and the logarithm of its sum.
const OUTPUTS: usize = 4;
const LOGP: usize = 0;
const ENTROPY: usize = 1;

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
    Ok(outputs.get(LOGP)?.reshape(targets.dims())?)
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
    let row = |i| outputs.get(i)?.reshape(targets.dims());
    Ok((row(LOGP)?, row(ENTROPY)?))
}

fn apply(
    logits: &Tensor,
    targets: &Tensor,
    options: &LogprobOptions,
    entropy: bool,
) -> Result<Tensor> {
    options.validate()?;
    check_dtype(OP, "logits", logits, &[DType::F32, DType::F16, DType::BF16])?;
    let Some((&vocab, leading)) = logits.dims().split_last().filter(|(&v, _)| v > 0) else {
        return Err(Error::Shape {
            op: OP,
            arg: "logits",
            expected: "[.., V] with V > 0".into(),
            got: format!("{:?}", logits.dims()),
        });
    };
    let ids = [DType::U32, DType::I64];
    check_arg(OP, "targets", targets, leading, &ids, logits.device())?;

    let rows = leading.iter().product::<usize>();
    let targets = targets.detach().to_dtype(DType::I64)?.contiguous()?.reshape(rows)?;
    // In their own shape: of a reshape candle would make a pass of its own over the gradient.
    let logits = logits.contiguous()?;
    let pass = Pass { targets, vocab, options: *options, entropy };
    match logits.dtype() {
        DType::F32 => pass.apply::<f32>(&logits),
        DType::F16 => pass.apply::<f16>(&logits),
        _ => pass.apply::<bf16>(&logits),
    }
}

/// What both passes over the logits `[.., V]` of N rows need to know.
struct Pass {
    targets: Tensor,
    vocab: usize,
    options: LogprobOptions,
    entropy: bool,
}

impl Pass {
    /// `[OUTPUTS, N]`, a function of the logits.
    fn apply<T: Logit + Element>(self, logits: &Tensor) -> Result<Tensor> {
        let outputs = self.forward::<T>(logits)?;
        let (shape, z) = ((OUTPUTS, self.targets.elem_count()), logits.detach());
        node("ppo-logprob", &[logits], outputs, shape, move |outputs, grad| {
            Ok(vec![Some(self.backward::<T>(&z, outputs, grad)?)])
        })
    }

    fn forward<T: Logit + Element>(&self, logits: &Tensor) -> Result<Buffer<f32>> {
        let (rows, vocab) = (self.targets.elem_count(), self.vocab);
        let backend = Backend::of(OP, "logits", logits.device())?;
        let z = view::<T>(OP, "logits", logits)?;
        let targets = view::<i64>(OP, "targets", &self.targets)?;
        // The entropies must be numbers even where they are not asked for.
        let mut outputs = backend.zeros(OUTPUTS * rows)?;
        match &backend {
            Backend::Cpu => {
                let [logp, entropy, max, log_sum] = parts_mut(outputs.cpu());
                let stats = Some(cpu::RowStatsMut { max, log_sum });
                let entropy = self.entropy.then_some(entropy);
                let outputs = cpu::Outputs { logp, entropy, stats };
                cpu::forward(z.cpu(), targets.cpu(), vocab, &self.options, outputs)?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let stream = backend.stream()?;
                let [logp, entropy, max, log_sum] = outputs.cuda().parts();
                let stats = Some(cuda::RowStatsMut { max, log_sum });
                let entropy = self.entropy.then_some(entropy);
                let outputs = cuda::Outputs { logp, entropy, stats };
                let len = cuda::workspace_len::<T>(stream.device(), rows, vocab);
                let mut workspace = backend.buffer(len)?;
                cuda::forward(
                    &stream,
                    z.cuda(),
                    targets.cuda(),
                    vocab,
                    &self.options,
                    outputs,
                    workspace.slice(),
                )?;
            }
        }
        Ok(outputs)
    }

    /// The logits' gradient, from the node's outputs and their gradients.
    fn backward<T: Logit + Element>(
        &self,
        logits: &Tensor,
        outputs: &Tensor,
        grad: &Tensor,
    ) -> Result<Tensor> {
        let backend = Backend::of(OP, "logits", logits.device())?;
        let z = view::<T>(OP, "logits", logits)?;
        let targets = view::<i64>(OP, "targets", &self.targets)?;
        let outputs = view::<f32>(OP, "outputs", outputs)?;
        let grad = view::<f32>(OP, "grad", grad)?;
        let mut out = backend.buffer::<T>(logits.elem_count())?;
        match &backend {
            Backend::Cpu => {
                let [_, entropy, max, log_sum] = parts(outputs.cpu());
                let stats = cpu::RowStats { max, log_sum, entropy };
                let [logp, entropy, _, _] = parts(grad.cpu());
                let entropy = self.entropy.then_some(entropy);
                let upstream = cpu::Upstream { logp: Some(logp), entropy };
                let (z, targets) = (z.cpu(), targets.cpu());
                cpu::backward(z, targets, self.vocab, &self.options, stats, upstream, out.cpu())?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let [_, entropy, max, log_sum] = outputs.cuda().parts();
                let stats = cuda::RowStats { max, log_sum, entropy };
                let [logp, entropy, _, _] = grad.cuda().parts();
                let entropy = self.entropy.then_some(entropy);
                let upstream = cuda::Upstream { logp: Some(logp), entropy };
                cuda::backward(
                    &backend.stream()?,
                    z.cuda(),
                    targets.cuda(),
                    self.vocab,
                    &self.options,
                    stats,
                    upstream,
                    out.cuda(),
                )?;
            }
        }
        Ok(out.into_tensor(logits.shape()))
    }
}
