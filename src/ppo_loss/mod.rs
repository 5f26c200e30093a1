//! ppo_loss
