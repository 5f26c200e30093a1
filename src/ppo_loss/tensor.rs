//! The candle function. Loss, statistics and gradients are made at once, in one pass. The statistics,
//! with the loss in front, are the output of a node of candle's graph, whose backward only scales the
//! gradients that are there.

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, PpoLossOptions, PpoStats, OP};
use crate::error::{Error, Result};
use crate::tensor::buffers;
#[cfg(feature = "cuda")]
use crate::tensor::cuda_buffers;
use crate::tensor::{
    check_arg, check_dtype, cpu_buffers, node, optional_view, view, Backend, Buffer, View,
};

/// The inputs of the value term, each `[B, T]` f32.
#[derive(Debug, Clone, Copy)]
pub struct PpoLossValueInputs<'a> {
    /// The critic's predictions, which get the gradient.
    pub values: &'a Tensor,
    /// Its predictions at the time of the rollout; may be `None` when values are not clipped.
    pub old_values: Option<&'a Tensor>,
    /// The targets of the regression.
    pub returns: &'a Tensor,
}

/// The inputs of the loss, each `[B, T]`; f32, but for the mask.
#[derive(Debug, Clone, Copy)]
pub struct PpoLossInputs<'a> {
    /// Log-probabilities under the policy that is trained, which get the gradient.
    pub logp: &'a Tensor,
    /// Log-probabilities under the policy that made the rollout.
    pub old_logp: &'a Tensor,
    /// Advantages, already whitened if they are to be.
    pub advantages: &'a Tensor,
    /// For the value term.
    pub value: Option<PpoLossValueInputs<'a>>,
    /// Entropy of the policy's distribution at each token, which gets the gradient.
    pub entropy: Option<&'a Tensor>,
    /// Log-probabilities under the reference model, for the KL term.
    pub ref_logp: Option<&'a Tensor>,
    /// u8, 0 masks a token out; `None` keeps all.
    pub mask: Option<&'a Tensor>,
}

impl<'a> PpoLossInputs<'a> {
    /// The policy term alone, to be filled in with
    /// `PpoLossInputs { mask: Some(..), ..PpoLossInputs::new(logp, old_logp, advantages) }`.
    pub fn new(logp: &'a Tensor, old_logp: &'a Tensor, advantages: &'a Tensor) -> Self {
        Self { logp, old_logp, advantages, value: None, entropy: None, ref_logp: None, mask: None }
    }
}

/// What [`ppo_loss`] returns.
#[derive(Debug, Clone)]
pub struct PpoLossOutput {
    /// The loss, a scalar f32 with gradient to logp, values and entropy.
    pub loss: Tensor,
    /// The statistics, on the device of the inputs.
    pub stats: PpoStatsTensor,
}

/// The statistics where they were computed, so that nobody has to wait for them.
#[derive(Debug, Clone)]
pub struct PpoStatsTensor(Tensor);

impl PpoStatsTensor {
    /// f32 `[PpoStats::LEN]`, in the order of [`PpoStats::NAMES`].
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }

    /// Brings them to the host, which waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<PpoStats> {
        let mut array = [0.0; PpoStats::LEN];
        for (x, stat) in array.iter_mut().zip(self.0.to_vec1::<f32>()?) {
            *x = f64::from(stat);
        }
        Ok(PpoStats::from_array(array))
    }
}

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
    options.validate()?;
    let (shape, device) = check(inputs)?;
    let value = inputs.value;
    options.validate_inputs(
        value.is_some_and(|v| v.old_values.is_none()),
        inputs.entropy.is_some(),
        inputs.ref_logp.is_some(),
    )?;

    // These stay in the graph; everything else is only read.
    let logp = inputs.logp.contiguous()?;
    let values = value.map(|v| v.values.contiguous()).transpose()?;
    let entropy = inputs.entropy.map(Tensor::contiguous).transpose()?;
    let plain = |tensor: &Tensor| tensor.detach().contiguous();
    let tensors = Contiguous {
        logp: logp.detach(),
        old_logp: plain(inputs.old_logp)?,
        advantages: plain(inputs.advantages)?,
        values: values.as_ref().map(Tensor::detach),
        old_values: value.and_then(|v| v.old_values).map(plain).transpose()?,
        returns: value.map(|v| plain(v.returns)).transpose()?,
        entropy: entropy.as_ref().map(Tensor::detach),
        ref_logp: inputs.ref_logp.map(plain).transpose()?,
        mask: inputs.mask.map(plain).transpose()?,
    };

    // An entropy that is only reported gets no gradient.
    let entropy = entropy.filter(|_| options.entropy_coef != 0.0);
    let args = [Some(logp), values, entropy].map(|arg| arg.filter(Tensor::track_op));
    let wanted = args.each_ref().map(Option::is_some);
    let Computed { stats, grads } = tensors.compute(shape, options, wanted, device)?;
    let args: Vec<&Tensor> = args.iter().flatten().collect();
    let stats = node("ppo-loss", &args, stats, PpoStats::LEN, move |_, upstream| {
        scaled(&grads, &upstream.get(0)?)
    })?;
    Ok(PpoLossOutput { loss: stats.get(0)?, stats: PpoStatsTensor(stats.detach()) })
}

/// Shape and device of all inputs.
fn check<'a>(inputs: &PpoLossInputs<'a>) -> Result<((usize, usize), &'a Device)> {
    let logp = inputs.logp;
    check_dtype(OP, "logp", logp, &[DType::F32])?;
    let &[batch, seq_len] = logp.dims() else {
        return Err(Error::Shape {
            op: OP,
            arg: "logp",
            expected: "[B, T]".into(),
            got: format!("{:?}", logp.dims()),
        });
    };
    let value = inputs.value;
    for (arg, tensor, dtype) in [
        ("old_logp", Some(inputs.old_logp), DType::F32),
        ("advantages", Some(inputs.advantages), DType::F32),
        ("values", value.map(|v| v.values), DType::F32),
        ("old_values", value.and_then(|v| v.old_values), DType::F32),
        ("returns", value.map(|v| v.returns), DType::F32),
        ("entropy", inputs.entropy, DType::F32),
        ("ref_logp", inputs.ref_logp, DType::F32),
        ("mask", inputs.mask, DType::U8),
    ] {
        if let Some(tensor) = tensor {
            check_arg(OP, arg, tensor, logp.dims(), &[dtype], logp.device())?;
        }
    }
    Ok(((batch, seq_len), logp.device()))
}

/// The inputs, checked, contiguous and out of the graph.
struct Contiguous {
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Option<Tensor>,
    old_values: Option<Tensor>,
    returns: Option<Tensor>,
    entropy: Option<Tensor>,
    ref_logp: Option<Tensor>,
    mask: Option<Tensor>,
}

/// What the pass leaves on the device.
struct Computed {
    /// `[PpoStats::LEN]`, the loss first.
    stats: Buffer<f32>,
    /// With respect to logp, values and entropy, where wanted.
    grads: [Option<Tensor>; 3],
}

impl Contiguous {
    fn compute(
        &self,
        shape: (usize, usize),
        options: &PpoLossOptions,
        wanted: [bool; 3],
        device: &Device,
    ) -> Result<Computed> {
        let (batch, seq_len) = shape;
        let backend = Backend::of(OP, "logp", device)?;
        let mut grads = buffers::<f32, 3>(&backend, wanted, batch * seq_len)?;
        let mut stats = backend.buffer::<f32>(PpoStats::LEN)?;

        let logp = view::<f32>(OP, "logp", &self.logp)?;
        let old_logp = view::<f32>(OP, "old_logp", &self.old_logp)?;
        let advantages = view::<f32>(OP, "advantages", &self.advantages)?;
        let values = optional_view::<f32>(OP, "values", &self.values)?;
        let old_values = optional_view::<f32>(OP, "old_values", &self.old_values)?;
        let returns = optional_view::<f32>(OP, "returns", &self.returns)?;
        let entropy = optional_view::<f32>(OP, "entropy", &self.entropy)?;
        let ref_logp = optional_view::<f32>(OP, "ref_logp", &self.ref_logp)?;
        let mask = optional_view::<u8>(OP, "mask", &self.mask)?;
        // The inputs of the backends have the same names.
        macro_rules! inputs {
            ($backend:ident, $elements:ident) => {
                $backend::Inputs {
                    batch,
                    seq_len,
                    logp: logp.$elements(),
                    old_logp: old_logp.$elements(),
                    advantages: advantages.$elements(),
                    value: values.as_ref().zip(returns.as_ref()).map(|(values, returns)| {
                        $backend::ValueInputs {
                            values: values.$elements(),
                            old_values: old_values.as_ref().map(View::$elements),
                            returns: returns.$elements(),
                        }
                    }),
                    entropy: entropy.as_ref().map(View::$elements),
                    ref_logp: ref_logp.as_ref().map(View::$elements),
                    mask: mask.as_ref().map(View::$elements),
                }
            };
        }
        match &backend {
            Backend::Cpu => {
                let [logp, values, entropy] = cpu_buffers(&mut grads);
                let gradients = cpu::Gradients { logp, values, entropy };
                let computed = cpu::ppo_loss(&inputs!(super, cpu), options, gradients)?;
                stats.cpu().copy_from_slice(&computed.to_array().map(|x| x as f32));
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let [logp, values, entropy] = cuda_buffers(&mut grads);
                let gradients = cuda::Gradients { logp, values, entropy };
                let mut workspace = backend.buffer(cuda::workspace_len(batch, seq_len, options))?;
                cuda::ppo_loss(
                    &backend.stream()?,
                    &inputs!(cuda, cuda),
                    options,
                    gradients,
                    stats.cuda(),
                    workspace.slice(),
                )?;
            }
        }
        Ok(Computed { stats, grads: grads.map(|grad| Some(grad?.into_tensor(shape))) })
    }
}

/// The gradients times that of the loss, a scalar.
fn scaled(grads: &[Option<Tensor>; 3], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let backend = Backend::of(OP, "grad", upstream.device())?;
    match &backend {
        Backend::Cpu => {
            let scaled = |grad: &Tensor| Ok(Some(grad.broadcast_mul(upstream)?));
            grads.iter().flatten().map(scaled).collect()
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(cuda) => {
            let Some(shape) = grads.iter().flatten().map(Tensor::shape).next() else {
                return Ok(Vec::new());
            };
            let wanted = grads.each_ref().map(Option::is_some);
            let mut out = buffers::<f32, 3>(&backend, wanted, shape.elem_count())?;
            let logp = optional_view::<f32>(OP, "grad_logp", &grads[0])?;
            let values = optional_view::<f32>(OP, "grad_values", &grads[1])?;
            let entropy = optional_view::<f32>(OP, "grad_entropy", &grads[2])?;
            let stored = cuda::StoredGradients {
                logp: logp.as_ref().map(View::cuda),
                values: values.as_ref().map(View::cuda),
                entropy: entropy.as_ref().map(View::cuda),
            };
            let [logp, values, entropy] = cuda_buffers(&mut out);
            let gradients = cuda::Gradients { logp, values, entropy };
            let upstream = view::<f32>(OP, "grad", upstream)?;
            cuda::scale(&cuda.stream()?, upstream.cuda(), stored, gradients)?;
            Ok(out.into_iter().flatten().map(|grad| Some(grad.into_tensor(shape))).collect())
        }
    }
}
