//! The one error type of the crate. Every variant names the op and the argument, what was expected
//! and what came.

/// An error of a call of this crate.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument's length, rank or shape does not fit the op or the other arguments.
    #[error("{op}: `{arg}` has shape {got}, expected {expected}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// The argument it refused.
        arg: &'static str,
        /// The shape it would have taken.
        expected: String,
        /// The shape it was given.
        got: String,
    },
    /// An argument's element type is not one that the op takes.
    #[error("{op}: `{arg}` has dtype {got}, expected {expected}")]
    Dtype {
        /// The op that refused.
        op: &'static str,
        /// The argument it refused.
        arg: &'static str,
        /// The element types it would have taken.
        expected: String,
        /// The element type it was given.
        got: String,
    },
    /// An argument is on another device than the op's other arguments, or on one without kernels.
    #[error("{op}: `{arg}` is on device {got}, expected {expected}")]
    Device {
        /// The op that refused.
        op: &'static str,
        /// The argument it refused.
        arg: &'static str,
        /// The device it would have taken.
        expected: String,
        /// The device it was given.
        got: String,
    },
    /// A setting is out of its range, not finite, or does not go with the arguments given.
    #[error("{op}: option `{option}` is {got}, expected {expected}")]
    Option {
        /// The op that refused.
        op: &'static str,
        /// The setting it refused.
        option: &'static str,
        /// The values it would have taken.
        expected: String,
        /// The value it was given.
        got: String,
    },
    /// A number of an argument is none of those that it may hold.
    #[error("{op}: `{arg}`[{index}] is {got}, expected {expected}")]
    Value {
        /// The op that refused.
        op: &'static str,
        /// The argument it refused.
        arg: &'static str,
        /// Which number of it, counted over all dimensions.
        index: usize,
        /// The values it would have taken.
        expected: &'static str,
        /// The value it was given.
        got: i64,
    },
    /// An argument that another one needs is not given.
    #[error("{op}: `{arg}` is missing, which `{needed_by}` needs")]
    Missing {
        /// The op that refused.
        op: &'static str,
        /// The argument that is not there.
        arg: &'static str,
        /// The argument that is.
        needed_by: &'static str,
    },
    /// A target token id that is neither in the vocabulary nor `ignore_index`.
    #[error("{op}: `targets`[{row}] is {target}, expected 0..{vocab} or ignore_index")]
    Target {
        /// The op that refused.
        op: &'static str,
        /// The row of the target, counted over all leading dimensions.
        row: usize,
        /// The id it was given.
        target: i64,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// Too few unmasked elements for the result to be defined.
    #[error("{op}: `{arg}` keeps {got} element(s), expected at least {expected}")]
    Mask {
        /// The op that refused.
        op: &'static str,
        /// The mask it refused, or without a mask the argument that has too few elements.
        arg: &'static str,
        /// The least number of unmasked elements.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// There is no CUDA driver on this machine, or it is too old.
    #[error("no CUDA driver: {reason}")]
    CudaDriver {
        /// The message of the driver's library, or of the search for it.
        reason: String,
    },
    /// The driver has no device or no context to offer.
    #[error("no CUDA device: {reason}")]
    CudaDevice {
        /// The driver's message.
        reason: String,
    },
    /// The kernels were not compiled for the device's architecture.
    #[error(
        "{op}: the kernels were not built for this device, of compute capability {}.{} ({reason}); \
         devices before 8.0 are not supported, and PPO_KERNELS_CUDA_ARCHS at build time chooses \
         among the others",
        compute_capability.0, compute_capability.1
    )]
    CudaImage {
        /// The op whose kernels are missing.
        op: &'static str,
        /// Major and minor number.
        compute_capability: (u32, u32),
        /// The driver's message.
        reason: String,
    },
    /// The device is out of memory.
    #[error("{op}: the CUDA device is out of memory")]
    CudaMemory {
        /// The op that asked for it.
        op: &'static str,
    },
    /// A kernel could not be launched, or an earlier one failed.
    #[error("{op}: the kernel {kernel} failed: {reason}")]
    CudaLaunch {
        /// The op that launched it.
        op: &'static str,
        /// The kernel.
        kernel: String,
        /// The driver's message.
        reason: String,
    },
    /// An error of the tensor library.
    #[cfg(feature = "candle")]
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Lets the ops be used with `?` in functions that return candle's own result.
#[cfg(feature = "candle")]
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

impl Error {
    /// `Ok` when a raw slice has the length that the other arguments ask for.
    #[inline(always)]
    pub(crate) fn check_len(
        op: &'static str,
        arg: &'static str,
        got: usize,
        expected: usize,
    ) -> Result<()> {
        // Apart, so that a small call has no more to do than to compare.
        #[cold]
        fn wrong(op: &'static str, arg: &'static str, got: usize, expected: usize) -> Error {
            Error::Shape { op, arg, expected: format!("[{expected}]"), got: format!("[{got}]") }
        }
        if got == expected {
            return Ok(());
        }
        Err(wrong(op, arg, got, expected))
    }

    /// `Ok` when so many logits make `rows` rows of a vocabulary that is not empty.
    pub(crate) fn check_logits(
        op: &'static str,
        got: usize,
        rows: usize,
        vocab: usize,
    ) -> Result<()> {
        if vocab > 0 && rows.checked_mul(vocab) == Some(got) {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            arg: "logits",
            expected: format!("[{rows}, {}]", vocab.max(1)),
            got: format!("[{got}] for a vocabulary of {vocab}"),
        })
    }

    /// `Ok` when the second argument is given if the first one is.
    pub(crate) fn check_given(
        op: &'static str,
        [needed_by, arg]: [&'static str; 2],
        given: [bool; 2],
    ) -> Result<()> {
        if given == [true, false] {
            return Err(Error::Missing { op, arg, needed_by });
        }
        Ok(())
    }

    /// `Ok` when both arguments are given or neither is.
    pub(crate) fn check_both(
        op: &'static str,
        [a, b]: [&'static str; 2],
        given: [bool; 2],
    ) -> Result<()> {
        Self::check_given(op, [a, b], given)?;
        Self::check_given(op, [b, a], [given[1], given[0]])
    }

    /// `Ok` when a workspace has as many elements as it must have.
    pub(crate) fn check_workspace(op: &'static str, got: usize, needed: usize) -> Result<()> {
        if got >= needed {
            return Ok(());
        }
        let expected = format!("[{needed}] or more");
        Err(Error::Shape { op, arg: "workspace", expected, got: format!("[{got}]") })
    }

    /// `Ok` when the bounds of something leave a number between them. They may be infinite.
    pub(crate) fn check_bounds(
        op: &'static str,
        [min_name, max_name]: [&'static str; 2],
        [min, max]: [f64; 2],
    ) -> Result<()> {
        let refuse = |option, value: f64, expected: String| {
            Err(Error::Option { op, option, expected, got: format!("{value:?}") })
        };
        if min.is_nan() || min == f64::INFINITY {
            return refuse(min_name, min, "a number, or -inf".into());
        }
        // NaN too.
        if !(max >= min && max > f64::NEG_INFINITY) {
            let least = if min.is_finite() { format!("`{min_name}`") } else { "a number".into() };
            return refuse(max_name, max, format!("{least}, {min:?} or above, or inf"));
        }
        Ok(())
    }

    /// `Ok` when a setting is `valid` and finite in f32, in which the ops compute; `expected` says in
    /// words what is valid.
    pub(crate) fn check_option(
        op: &'static str,
        option: &'static str,
        value: f64,
        valid: bool,
        expected: &str,
    ) -> Result<()> {
        if valid && (value as f32).is_finite() {
            return Ok(());
        }
        let too_large = valid && value.is_finite();
        let expected = format!("{expected}{}", if too_large { ", within f32's range" } else { "" });
        // Debug, which writes 1e300 and not three hundred digits.
        Err(Error::Option { op, option, expected, got: format!("{value:?}") })
    }
}
