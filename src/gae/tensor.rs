//! The candle function.

use candle_core::{DType, Tensor};

use super::cpu::{self, Outputs};
use super::{GaeOptions, Inputs, OP};
use crate::error::{Error, Result};
use crate::tensor::{check_dtype, constant, optional_arg, optional_view, view};
use crate::whiten::Moments;

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
    /// Moments of the unmasked advantages.
    pub moments: Moments,
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

    let mut advantages = vec![0.0; batch * seq_len];
    let mut returns = vec![0.0; batch * seq_len];
    let mut shaped = vec![0.0; batch * seq_len];
    let moments = cpu::gae(
        Inputs {
            values: &view::<f32>(OP, "values", &values)?,
            rewards: optional_view(OP, "rewards", &rewards)?.as_deref(),
            kl: optional_view(OP, "kl", &kl)?.as_deref(),
            scores: optional_view(OP, "scores", &scores)?.as_deref(),
            has_eos: optional_view(OP, "has_eos", &has_eos)?.as_deref(),
            mask: optional_view(OP, "mask", &mask)?.as_deref(),
            dones: optional_view(OP, "dones", &dones)?.as_deref(),
            bootstrap: optional_view(OP, "bootstrap", &bootstrap)?.as_deref(),
        },
        batch,
        seq_len,
        options,
        Outputs { advantages: &mut advantages, returns: &mut returns, rewards: Some(&mut shaped) },
    )?;
    let tensor = |data: Vec<f32>| constant(data, &tokens);
    Ok(GaeOutput {
        advantages: tensor(advantages),
        returns: tensor(returns),
        rewards: tensor(shaped),
        moments,
    })
}
