//! The candle function.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, GaeOptions, OP};
use crate::error::{Error, Result};
use crate::tensor::{check_dtype, optional_arg, optional_view, view, Backend, View};
use crate::whiten::MomentsTensor;

/// The inputs of [`gae`]; see [the module](super) for their meaning.
#[derive(Debug, Clone, Copy)]
pub struct GaeInputs<'a> {
    /// Values, `[B, T]` in f32.
    pub values: &'a Tensor,
    /// Dense rewards, `[B, T]` in f32.
    pub rewards: Option<&'a Tensor>,
    /// KL to the reference policy, `[B, T]` in f32.
    pub kl: Option<&'a Tensor>,
    /// Scores of the sequences, `[B]` in f32.
    pub scores: Option<&'a Tensor>,
    /// Whether the sequence has an end-of-sequence token, `[B]` in u8.
    pub has_eos: Option<&'a Tensor>,
    /// 0 where masked, `[B, T]` in u8.
    pub mask: Option<&'a Tensor>,
    /// Non-zero where an episode ended with step t, `[B, T]` in u8.
    pub dones: Option<&'a Tensor>,
    /// Value of the state after the last unmasked token, `[B]` in f32.
    pub bootstrap: Option<&'a Tensor>,
}

impl<'a> GaeInputs<'a> {
    /// Values alone, to be filled in with `GaeInputs { mask: Some(..), ..GaeInputs::new(values) }`.
    pub fn new(values: &'a Tensor) -> Self {
        Self {
            values,
            rewards: None,
            kl: None,
            scores: None,
            has_eos: None,
            mask: None,
            dones: None,
            bootstrap: None,
        }
    }
}

/// What [`gae`] returns. The tensors are `[B, T]` in f32, 0 where masked, and constants to the
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
    let &[batch, seq_len] = values.dims() else {
        return Err(Error::Shape {
            op: OP,
            arg: "values",
            expected: "[B, T]".into(),
            got: format!("{:?}", values.dims()),
        });
    };
    let (tokens, rows, device) = ([batch, seq_len], [batch], values.device());

    let values = values.contiguous()?;
    let rewards = optional_arg(OP, "rewards", inputs.rewards, &tokens, DType::F32, device)?;
    let kl = optional_arg(OP, "kl", inputs.kl, &tokens, DType::F32, device)?;
    let scores = optional_arg(OP, "scores", inputs.scores, &rows, DType::F32, device)?;
    let has_eos = optional_arg(OP, "has_eos", inputs.has_eos, &rows, DType::U8, device)?;
    let mask = optional_arg(OP, "mask", inputs.mask, &tokens, DType::U8, device)?;
    let dones = optional_arg(OP, "dones", inputs.dones, &tokens, DType::U8, device)?;
    let bootstrap = optional_arg(OP, "bootstrap", inputs.bootstrap, &rows, DType::F32, device)?;

    let backend = Backend::of(OP, "values", device)?;
    let room = || backend.room::<f32>(batch * seq_len);
    let (mut advantages, mut returns, mut shaped) = (room()?, room()?, room()?);
    let mut moments = backend.room::<f64>(MomentsTensor::LEN)?;
    let values = view::<f32>(OP, "values", &values)?;
    let rewards = optional_view::<f32>(OP, "rewards", &rewards)?;
    let kl = optional_view::<f32>(OP, "kl", &kl)?;
    let scores = optional_view::<f32>(OP, "scores", &scores)?;
    let has_eos = optional_view::<u8>(OP, "has_eos", &has_eos)?;
    let mask = optional_view::<u8>(OP, "mask", &mask)?;
    let dones = optional_view::<u8>(OP, "dones", &dones)?;
    let bootstrap = optional_view::<f32>(OP, "bootstrap", &bootstrap)?;
    // The inputs of the backends have the same names.
    macro_rules! inputs {
        ($backend:ident, $elements:ident) => {
            $backend::Inputs {
                values: values.$elements(),
                rewards: rewards.as_ref().map(View::$elements),
                kl: kl.as_ref().map(View::$elements),
                scores: scores.as_ref().map(View::$elements),
                has_eos: has_eos.as_ref().map(View::$elements),
                mask: mask.as_ref().map(View::$elements),
                dones: dones.as_ref().map(View::$elements),
                bootstrap: bootstrap.as_ref().map(View::$elements),
            }
        };
    }
    match &backend {
        Backend::Cpu => {
            let outputs = cpu::Outputs {
                advantages: advantages.cpu(),
                returns: returns.cpu(),
                rewards: Some(shaped.cpu()),
            };
            let found = cpu::gae(inputs!(super, cpu), batch, seq_len, options, outputs)?;
            moments.cpu().copy_from_slice(&found.to_array());
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(backend) => {
            let outputs = cuda::Outputs {
                advantages: advantages.cuda(),
                returns: returns.cuda(),
                rewards: Some(shaped.cuda()),
                moments: Some(moments.cuda()),
            };
            let (stream, inputs) = (backend.stream()?, inputs!(cuda, cuda));
            let mut workspace = backend.room(cuda::workspace_len(batch, seq_len))?;
            let workspace = workspace.slice();
            cuda::gae(&stream, inputs, batch, seq_len, options, outputs, workspace)?;
        }
    }
    Ok(GaeOutput {
        advantages: advantages.into_tensor(&tokens),
        returns: returns.into_tensor(&tokens),
        rewards: shaped.into_tensor(&tokens),
        moments: MomentsTensor::from_room(moments),
    })
}
