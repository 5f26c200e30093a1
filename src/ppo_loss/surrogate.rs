//! The surrogates in f32, for the loops of the CPU. `kernels/common/policy.cuh` has those of the kernels.

use super::PpoLossOptions;
use crate::cpu::math::{clip, exp, select};
use crate::kl::limit;

/// One token, as a surrogate sees it.
#[derive(Clone, Copy)]
pub(super) struct Token {
    /// Clamped.
    pub log_ratio: f32,
    pub ratio: f32,
    pub logp: f32,
    pub advantage: f32,
}

/// A token's policy term.
#[derive(Clone, Copy)]
pub(super) struct Term {
    pub loss: f32,
    /// The derivative by the log-ratio, or by logp where the surrogate weighs that.
    pub slope: f32,
    pub is_clipped: bool,
    /// Whether the dual clip bounds it.
    pub is_lower: bool,
}

impl Term {
    #[inline(always)]
    fn new(loss: f32, slope: f32) -> Self {
        Self { loss, slope, is_clipped: false, is_lower: false }
    }
}

/// One of [`Surrogate`](super::Surrogate), with its options as the loops have them.
pub(super) trait Of: Copy {
    /// Whether it [weighs logp](super::Surrogate::weighs_logp): a clamp of the log-ratio does not stop the gradient.
    const WEIGHS_LOGP: bool = false;
    /// Whether log-ratios are clipped before they are added up.
    const CLIPS_LOG: bool = false;

    fn of(self, token: Token) -> Term;
}

/// [`Surrogate::Clip`](super::Surrogate::Clip). `low` and `high` are bounds of the ratio.
#[derive(Clone, Copy)]
pub(super) struct Clip<const CAPPED: bool> {
    pub low: f32,
    pub high: f32,
    /// Infinity is off, and so it is of `cap`.
    pub dual_clip: f32,
    pub cap: f32,
}

impl<const CAPPED: bool> Clip<CAPPED> {
    pub(super) fn new(options: &PpoLossOptions) -> Self {
        let (low, high) = options.ratio_bounds();
        Self {
            low: low as f32,
            high: high as f32,
            dual_clip: limit(options.dual_clip),
            cap: limit(options.ratio_cap),
        }
    }
}

impl<const CAPPED: bool> Of for Clip<CAPPED> {
    #[inline(always)]
    fn of(self, Token { ratio, advantage: a, .. }: Token) -> Term {
        let is_capped = CAPPED & (ratio > self.cap);
        let slope = -ratio * a;
        let unclipped_loss = if CAPPED { -select(is_capped, self.cap, ratio) * a } else { slope };
        let clipped_loss = -clip(ratio, self.low, self.high) * a;
        let is_clipped = clipped_loss > unclipped_loss;
        let larger = select(is_clipped, clipped_loss, unclipped_loss);
        let bound = select(a < 0.0, -self.dual_clip * a, f32::INFINITY);
        // Below the upper bound, but above the cap, the clipped branch is -r A.
        let is_inside = is_capped & (ratio >= self.low) & (ratio <= self.high);
        let stops = (is_clipped & !is_inside) | (!is_clipped & is_capped);
        let is_lower = larger > bound;
        Term {
            loss: select(is_lower, bound, larger),
            slope: select(stops | is_lower, 0.0, slope),
            is_clipped,
            is_lower,
        }
    }
}

/// [`Surrogate::LogClip`](super::Surrogate::LogClip): what is left of it after the mean.
#[derive(Clone, Copy)]
pub(super) struct LogClip;

impl Of for LogClip {
    const CLIPS_LOG: bool = true;

    #[inline(always)]
    fn of(self, Token { ratio, advantage, .. }: Token) -> Term {
        let loss = -ratio * advantage;
        Term::new(loss, loss)
    }
}

/// -weight A logp.
#[inline(always)]
fn weighted(weight: f32, Token { advantage, logp, .. }: Token) -> Term {
    let slope = -weight * advantage;
    Term::new(slope * logp, slope)
}

/// [`Surrogate::Reinforce`](super::Surrogate::Reinforce).
#[derive(Clone, Copy)]
pub(super) struct Reinforce;

impl Of for Reinforce {
    const WEIGHS_LOGP: bool = true;

    #[inline(always)]
    fn of(self, token: Token) -> Term {
        weighted(1.0, token)
    }
}

/// [`Surrogate::ClippedWeight`](super::Surrogate::ClippedWeight).
#[derive(Clone, Copy)]
pub(super) struct ClippedWeight {
    low: f32,
    high: f32,
}

impl ClippedWeight {
    pub(super) fn new(options: &PpoLossOptions) -> Self {
        let (low, high) = options.ratio_bounds();
        Self { low: low as f32, high: high as f32 }
    }
}

impl Of for ClippedWeight {
    const WEIGHS_LOGP: bool = true;

    #[inline(always)]
    fn of(self, token: Token) -> Term {
        let weight = clip(token.ratio, self.low, self.high);
        Term {
            is_clipped: (token.ratio < self.low) | (token.ratio > self.high),
            ..weighted(weight, token)
        }
    }
}

/// [`Surrogate::GammaWeight`](super::Surrogate::GammaWeight), with its options for A >= 0 and A < 0.
#[derive(Clone, Copy)]
pub(super) struct GammaWeight {
    k: [f32; 2],
    lambda: [f32; 2],
}

impl GammaWeight {
    pub(super) fn new(options: &PpoLossOptions) -> Self {
        Self {
            k: [options.gamma_k_pos, options.gamma_k_neg].map(|k| k as f32),
            lambda: [options.gamma_lambda_pos, options.gamma_lambda_neg].map(|x| x as f32),
        }
    }
}

impl Of for GammaWeight {
    const WEIGHS_LOGP: bool = true;

    #[inline(always)]
    fn of(self, token: Token) -> Term {
        /// ln 1e-8.
        const LEAST: f32 = -18.420_68;
        let is_pos = token.advantage >= 0.0;
        let k = select(is_pos, self.k[0], self.k[1]);
        let lambda = select(is_pos, self.lambda[0], self.lambda[1]);
        let log_ratio = select(token.log_ratio < LEAST, LEAST, token.log_ratio);
        let ratio = select(token.log_ratio < LEAST, 1e-8, token.ratio);
        // Without λ the ratio, which may be infinite, is not wanted.
        let of_ratio = select(lambda == 0.0, 0.0, lambda * ratio);
        weighted(exp(k.mul_add(log_ratio, lambda - of_ratio)), token)
    }
}

/// [`Surrogate::SoftGate`](super::Surrogate::SoftGate), with its option for A > 0 and otherwise.
#[derive(Clone, Copy)]
pub(super) struct SoftGate {
    tau: [f32; 2],
}

impl SoftGate {
    pub(super) fn new(options: &PpoLossOptions) -> Self {
        Self { tau: [options.soft_gate_tau_pos, options.soft_gate_tau_neg].map(|tau| tau as f32) }
    }
}

impl Of for SoftGate {
    #[inline(always)]
    fn of(self, Token { ratio, advantage: a, .. }: Token) -> Term {
        let tau = select(a > 0.0, self.tau[0], self.tau[1]);
        let x = tau * (ratio - 1.0);
        // Of -|x|, so that it does not overflow.
        let e = exp(-x.abs());
        let larger = 1.0 / (1.0 + e);
        let gate = select(x < 0.0, e * larger, larger);
        // e is 0 where the ratio is infinite, and so is the slope.
        let slope = 4.0 * e * larger * larger;
        let slope = select(slope == 0.0, 0.0, slope * ratio);
        Term::new(-4.0 / tau * gate * a, -slope * a)
    }
}

/// `$body` with `$surrogate` as that of `$options`.
macro_rules! with_surrogate {
    ($options:expr, $surrogate:ident => $body:expr) => {{
        use $crate::ppo_loss::surrogate::*;
        use $crate::ppo_loss::Surrogate;

        let options = $options;
        match options.surrogate {
            Surrogate::Clip => {
                let $surrogate = Clip::<true>::new(options);
                $body
            }
            Surrogate::LogClip => {
                let $surrogate = LogClip;
                $body
            }
            Surrogate::Reinforce => {
                let $surrogate = Reinforce;
                $body
            }
            Surrogate::ClippedWeight => {
                let $surrogate = ClippedWeight::new(options);
                $body
            }
            Surrogate::GammaWeight => {
                let $surrogate = GammaWeight::new(options);
                $body
            }
            Surrogate::SoftGate => {
                let $surrogate = SoftGate::new(options);
                $body
            }
        }
    }};
}
pub(super) use with_surrogate;
