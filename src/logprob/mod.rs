//! logprob
