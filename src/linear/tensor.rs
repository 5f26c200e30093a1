//! The candle function.

use candle_core::{DType, Tensor};

use super::{
    cpu, BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs, LinearOptions, Sizes, OP,
};
use crate::cpu::{Logit, RowsMut};
use crate::error::{Error, Result};
use crate::memory::Tensors;
use crate::tensor::{
    check_arg, check_dtype, node, row, with_logits, Backend, Buffer, Held, OnCpu, Owned,
};

/// Rows of the node's output.
const LOGP: usize = 0;
const ENTROPY: usize = 1;
const MAX: usize = 2;
const LOG_SUM: usize = 3;
const OUTPUTS: usize = 4;

/// The inputs of [`linear_logprobs`] as tensors.
pub type LinearInputs<'a> = ForwardInputs<'a, Tensors, f32, i64>;

/// Log-probabilities and entropies, f32 of the targets' shape, with gradients to hidden states, weight and
/// bias.
#[derive(Debug, Clone)]
pub struct LinearOutput {
    /// Log-probabilities of the targets.
    pub logp: Tensor,
    /// Entropies, if they were asked for.
    pub entropy: Option<Tensor>,
}

/// Log-probabilities of the targets, and the entropies if `with_entropy`, from hidden states and the head's
/// weight, without the logits.
///
/// `hidden` is `[.., H]` in f32, f16 or bf16, `weight` `[V, H]` and `bias` `[V]` in the same, and all three
/// take a gradient; `targets` is `[..]` in u32 or i64, `temperatures` in f32. See [the module](super).
///
/// # Errors
/// If a shape, dtype or device does not fit, an option is out of range, a target is outside the vocabulary,
/// or the tensors are not on the CPU.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use ppo_kernels::linear::{linear_logprobs, LinearInputs, LinearOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let hidden = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let weight = Var::new(&[[0f32, 0.0], [1.0, -0.5], [0.0, 0.0]], &Device::Cpu)?;
/// let targets = Tensor::new(&[2u32], &Device::Cpu)?;
/// let inputs = LinearInputs::new(&hidden, &weight, &targets);
/// let output = linear_logprobs(&inputs, &LinearOptions::default(), false)?;
/// assert!((output.logp.to_vec1::<f32>()?[0] - (1f32 / 3.0).ln()).abs() < 1e-6);
/// let grads = output.logp.sum_all()?.backward()?;
/// assert_eq!(grads.get(&weight).unwrap().dims(), [3, 2]);
/// # Ok(())
/// # }
/// ```
pub fn linear_logprobs(
    inputs: &LinearInputs,
    options: &LinearOptions,
    with_entropy: bool,
) -> Result<LinearOutput> {
    let LinearInputs { hidden, weight, targets, bias, temperatures } = *inputs;
    check_dtype(OP, "hidden", hidden, &[DType::F32, DType::F16, DType::BF16])?;
    let [leading @ .., hidden_size] = hidden.dims() else {
        let expected = "[.., H]".to_string();
        return Err(Error::Shape { op: OP, arg: "hidden", expected, got: "[]".into() });
    };
    let device = hidden.device();
    if !device.is_cpu() {
        return Err(Error::Device {
            op: OP,
            arg: "hidden",
            expected: "cpu".into(),
            got: format!("{:?}", device.location()),
        });
    }
    let vocab = weight.dims().first().copied().unwrap_or(0);
    check_arg(OP, "weight", weight, &[vocab.max(1), *hidden_size], &[hidden.dtype()], device)?;
    if let Some(bias) = bias {
        check_arg(OP, "bias", bias, &[vocab], &[hidden.dtype()], device)?;
    }
    check_arg(OP, "targets", targets, leading, &[DType::U32, DType::I64], device)?;
    if let Some(temperatures) = temperatures {
        check_arg(OP, "temperatures", temperatures, leading, &[DType::F32], device)?;
    }

    let ids = targets.detach().to_dtype(DType::I64)?.contiguous()?;
    let sizes = Sizes { rows: ids.elem_count(), hidden_size: *hidden_size, vocab };
    let pass = Pass { sizes, options: *options, with_entropy };
    let outputs = with_logits!(hidden, T => pass.apply::<T>(inputs, ids))?;
    let output = |i| row(&outputs, i)?.reshape(targets.dims());
    let entropy = with_entropy.then(|| output(ENTROPY)).transpose()?;
    Ok(LinearOutput { logp: output(LOGP)?, entropy })
}

/// The parameters of both passes besides their lists.
struct Pass {
    sizes: Sizes,
    options: LinearOptions,
    with_entropy: bool,
}

impl Pass {
    /// `[OUTPUTS, N]`, a function of hidden states, weight and bias.
    fn apply<T: Logit>(self, given: &LinearInputs, targets: Tensor) -> Result<Tensor> {
        let LinearInputs { hidden, weight, bias, temperatures, .. } = *given;
        let constant = |tensor: &Tensor| tensor.detach().contiguous();
        let inputs = ForwardInputs::<Owned, T, i64> {
            hidden: constant(hidden)?,
            weight: constant(weight)?,
            targets,
            bias: bias.map(constant).transpose()?,
            temperatures: temperatures.map(constant).transpose()?,
        };
        let outputs = self.forward(&inputs)?;
        let shape = (OUTPUTS, self.sizes.rows);
        let args: Vec<&Tensor> = [Some(hidden), Some(weight), bias].into_iter().flatten().collect();
        let tracked: Vec<bool> = args.iter().map(|arg| arg.track_op()).collect();
        node("ppo-linear", &args, outputs, shape, move |outputs, grad| {
            let entropy = |of| self.with_entropy.then(|| row(of, ENTROPY)).transpose();
            let inputs = BackwardInputs {
                forward: inputs.clone(),
                max: row(outputs, MAX)?,
                log_sum: row(outputs, LOG_SUM)?,
                entropy: entropy(outputs)?,
                grad_logp: Some(row(grad, LOGP)?),
                grad_entropy: entropy(grad)?,
            };
            self.backward(&inputs, &tracked)
        })
    }

    fn forward<T: Logit>(&self, inputs: &ForwardInputs<Owned, T, i64>) -> Result<Buffer<f32>> {
        let Sizes { rows, hidden_size, vocab } = self.sizes;
        let shape = (&[rows][..], hidden_size, vocab);
        let views = inputs.try_map(shape, &mut Held(OP))?;
        let Ok(inputs) = views.try_map(shape, &mut OnCpu);
        let mut buffer = Backend::Cpu.buffer(OUTPUTS * rows)?;
        let parts = RowsMut { data: buffer.cpu(), width: rows };
        let [logp, entropy, max, log_sum] = parts.disjoint([LOGP, ENTROPY, MAX, LOG_SUM]);
        let entropy = self.with_entropy.then_some(entropy);
        let outputs = ForwardOutputs { logp, max, log_sum, entropy };
        cpu::forward(inputs, self.sizes, &self.options, outputs)?;
        Ok(buffer)
    }

    /// The gradients of the arguments that are tracked, in their order.
    fn backward<T: Logit>(
        &self,
        inputs: &BackwardInputs<Owned, T, i64>,
        tracked: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let Sizes { rows, hidden_size, vocab } = self.sizes;
        let shape = (&[rows][..], hidden_size, vocab);
        let forward = &inputs.forward;
        let args = [Some(&forward.hidden), Some(&forward.weight), forward.bias.as_ref()];
        let wanted = |i: usize, arg: Option<&Tensor>| {
            let arg = arg.filter(|_| tracked.get(i).copied().unwrap_or(false));
            arg.map(|arg| Backend::Cpu.buffer(arg.elem_count())).transpose()
        };
        let mut buffers = BackwardOutputs::<Owned, T> {
            grad_hidden: wanted(0, args[0])?,
            grad_weight: wanted(1, args[1])?,
            grad_bias: wanted(2, args[2])?,
        };
        {
            let views = inputs.try_map(shape, &mut Held(OP))?;
            let Ok(inputs) = views.try_map(shape, &mut OnCpu);
            let Ok(outputs) = buffers.try_map(shape, &mut OnCpu);
            cpu::backward(inputs, self.sizes, &self.options, outputs)?;
        }
        let BackwardOutputs { grad_hidden, grad_weight, grad_bias } = buffers;
        let found = [grad_hidden, grad_weight, grad_bias].into_iter().zip(args).take(tracked.len());
        let tensor = |(grad, arg): (Option<Buffer<T>>, Option<&Tensor>)| {
            grad.zip(arg).map(|(grad, arg)| grad.into_tensor(arg.shape()))
        };
        Ok(found.map(tensor).collect())
    }
}
