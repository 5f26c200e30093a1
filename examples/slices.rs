//! The ops on slices, without candle: rows of different lengths one behind the other, advantages written over
//! nothing but the caller's own memory.
//!
//! cargo run --release --example slices

use ppo_kernels::gae::{cpu, GaeOptions};
use ppo_kernels::moments::Moments;

fn main() -> ppo_kernels::Result<()> {
    // Three answers, of 2, 0 and 3 tokens.
    let offsets = [0i64, 2, 2, 5];
    let values = [0.1f32, 0.2, 0.3, 0.1, 0.0];
    let scores = [1.0f32, 0.0, -0.5];
    let (batch, tokens) = (offsets.len() - 1, values.len());

    let (mut advantages, mut returns) = ([0f32; 5], [0f32; 5]);
    let mut moments = [Moments::default()];
    let inputs =
        cpu::Inputs { scores: Some(&scores), offsets: Some(&offsets), ..cpu::Inputs::new(&values) };
    let outputs = cpu::Outputs {
        advantages: &mut advantages,
        returns: &mut returns,
        shaped_rewards: None,
        moments: Some(&mut moments),
    };
    cpu::gae(inputs, batch, tokens, &GaeOptions::default(), outputs)?;
    // The last token of a row has nothing behind it: score less value.
    assert_eq!([advantages[1], advantages[4]], [0.8, -0.5]);
    assert_eq!(moments[0].count, 5.0);
    println!("advantages {advantages:?}\nreturns {returns:?}\n{:?}", moments[0]);

    // Nothing panics on bad input, and nothing is written then.
    let inputs = cpu::Inputs { offsets: Some(&[0, 5]), ..inputs };
    let outputs = cpu::Outputs {
        advantages: &mut advantages,
        returns: &mut returns,
        shaped_rewards: None,
        moments: None,
    };
    let error = cpu::gae(inputs, batch, tokens, &GaeOptions::default(), outputs).unwrap_err();
    assert_eq!(error.to_string(), "gae: `offsets` has shape [2], expected [4]");
    println!("refused: {error}");
    Ok(())
}
