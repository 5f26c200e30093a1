//! The candle functions. One custom op makes every output of a row at once, since candle gives an op
//! one output: `[4, N]`, of which the caller sees the first one or two.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, Shape, Tensor, WithDType};
use half::{bf16, f16};

use super::cpu::{self, Outputs, RowStats, RowStatsMut, Upstream};
use super::{LogprobOptions, OP};
use crate::cpu::Logit;
use crate::error::{Error, Result};
use crate::tensor::{check_arg, check_dtype, no_kernels, slice, view};

/// Rows of the op's output.
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
/// vocabulary.
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
    if !logits.device().is_cpu() {
        return Err(no_kernels(OP, "logits", logits.device()));
    }
    // Here, where the error keeps its type; candle would turn it into a text.
    cpu::check_targets(&view::<i64>(OP, "targets", &targets)?, vocab, options)?;
    let op = Forward { targets, options: *options, entropy };
    // In its own shape: of a reshape candle would make a pass of its own over the gradient.
    Ok(logits.contiguous()?.apply_op1(op)?)
}

/// Logits `[.., V]` of N rows to outputs `[4, N]`.
struct Forward {
    targets: Tensor,
    options: LogprobOptions,
    entropy: bool,
}

impl CustomOp1 for Forward {
    fn name(&self) -> &'static str {
        "ppo-logprob"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match s {
            CpuStorage::F32(_) => self.run::<f32>(s, l),
            CpuStorage::F16(_) => self.run::<f16>(s, l),
            CpuStorage::BF16(_) => self.run::<bf16>(s, l),
            _ => unreachable!("checked by apply"),
        }?;
        let rows = self.targets.elem_count();
        Ok((CpuStorage::F32(out), Shape::from((OUTPUTS, rows))))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        outputs: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let op = Backward {
            targets: self.targets.clone(),
            options: self.options,
            entropy: self.entropy,
        };
        let (outputs, grad) = (outputs.detach(), grad.contiguous()?.detach());
        Ok(Some(logits.detach().apply_op3(&outputs, &grad, op)?))
    }
}

impl Forward {
    fn run<T: Logit + WithDType>(&self, storage: &CpuStorage, layout: &Layout) -> Result<Vec<f32>> {
        let targets = view::<i64>(OP, "targets", &self.targets)?;
        let rows = targets.len();
        let mut out = vec![0.0; OUTPUTS * rows];
        let (logp, rest) = out.split_at_mut(rows);
        let (entropy, rest) = rest.split_at_mut(rows);
        let (max, log_sum) = rest.split_at_mut(rows);
        let outputs = Outputs {
            logp,
            entropy: self.entropy.then_some(entropy),
            stats: Some(RowStatsMut { max, log_sum }),
        };
        let logits = slice::<T>(storage, layout)?;
        cpu::forward(logits, &targets, vocab(layout.dims()), &self.options, outputs)?;
        Ok(out)
    }
}

/// Logits `[.., V]`, the forward's outputs `[4, N]` and their gradient to the logits' gradient.
struct Backward {
    targets: Tensor,
    options: LogprobOptions,
    entropy: bool,
}

impl CustomOp3 for Backward {
    fn name(&self) -> &'static str {
        "ppo-logprob-backward"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        l1: &Layout,
        outputs: &CpuStorage,
        l2: &Layout,
        grad: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (outputs, grad) = (slice::<f32>(outputs, l2)?, slice::<f32>(grad, l3)?);
        let storage = match logits {
            CpuStorage::F32(_) => CpuStorage::F32(self.run(logits, l1, outputs, grad)?),
            CpuStorage::F16(_) => CpuStorage::F16(self.run(logits, l1, outputs, grad)?),
            CpuStorage::BF16(_) => CpuStorage::BF16(self.run(logits, l1, outputs, grad)?),
            _ => unreachable!("checked by apply"),
        };
        Ok((storage, l1.shape().clone()))
    }
}

impl Backward {
    fn run<T: Logit + WithDType>(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        outputs: &[f32],
        grad: &[f32],
    ) -> Result<Vec<T>> {
        let targets = view::<i64>(OP, "targets", &self.targets)?;
        let rows = targets.len();
        let stats = RowStats {
            max: row(outputs, MAX, rows),
            log_sum: row(outputs, LOG_SUM, rows),
            entropy: row(outputs, ENTROPY, rows),
        };
        let upstream = Upstream {
            logp: Some(row(grad, LOGP, rows)),
            entropy: self.entropy.then_some(row(grad, ENTROPY, rows)),
        };
        let logits = slice::<T>(storage, layout)?;
        let mut out = T::zeros(logits.len());
        let vocab = vocab(layout.dims());
        cpu::backward(logits, &targets, vocab, &self.options, stats, upstream, &mut out)?;
        Ok(out)
    }
}

/// The columns of a row.
fn vocab(dims: &[usize]) -> usize {
    *dims.last().expect("checked by apply")
}

fn row(outputs: &[f32], index: usize, rows: usize) -> &[f32] {
    &outputs[index * rows..][..rows]
}
