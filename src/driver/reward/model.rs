//! Scores from a reward model: its value at the last token of prompt and response.

use anyhow::{ensure, Result};

use super::{Reward, Sample};
use crate::driver::load::RewardModel;
use crate::driver::tokenizer::Tokenizer;

/// Samples scored at a time, which bounds the memory of activations.
const CHUNK: usize = 64;

/// A reward that a model was taught by preferences.
pub struct ModelReward {
    model: RewardModel,
}

impl ModelReward {
    /// A reward from a model, which does not learn.
    pub fn new(RewardModel { critic, tokenizer }: RewardModel) -> Self {
        Self { model: RewardModel { critic: critic.no_grad(), tokenizer } }
    }
}

impl Reward for ModelReward {
    fn name(&self) -> &str {
        "model"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>> {
        let RewardModel { critic, tokenizer } = &self.model;
        let mut scores = Vec::with_capacity(samples.len());
        for samples in samples.chunks(CHUNK) {
            let text = |sample: &Sample| [sample.prompt_ids, sample.response_ids].concat();
            let texts: Vec<Vec<u32>> = samples.iter().map(text).collect();
            scores.extend(critic.scores(&texts, tokenizer.pad())?.to_vec1::<f32>()?);
        }
        Ok(scores)
    }

    fn context(&self, policy: &Tokenizer) -> Result<usize> {
        let RewardModel { critic, tokenizer } = &self.model;
        ensure!(
            tokenizer.has_vocabulary_of(policy),
            "--reward model reads another vocabulary ({} tokens) than the policy writes ({})",
            tokenizer.vocab_size(),
            policy.vocab_size()
        );
        Ok(critic.config().max_position_embeddings)
    }
}
