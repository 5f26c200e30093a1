//! What came before PPO, on the same cart: a table of Q(state, action) over a grid of states (Watkins 1989).
//! It needs no gradient, and no more than a good grid: PPO's networks find theirs.
//!
//!     cargo run --release --example q_learning

mod environment;

use environment::{CartPole, End, State};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const EPISODES: usize = 20_000;
const GAMMA: f64 = 0.99;
/// Cells of each coordinate, and how far they go.
const CELLS: [usize; 4] = [3, 5, 12, 8];
const FARTHEST: [f32; 4] = [2.4, 2.0, 0.21, 2.5];
const SOLVED: f64 = 195.0;

/// The cell of a state.
fn cell(state: &State) -> usize {
    (0..4).fold(0, |cell, i| {
        let share = (state[i] / FARTHEST[i] + 1.0) / 2.0;
        let at = (share * CELLS[i] as f32).clamp(0.0, CELLS[i] as f32 - 1.0);
        cell * CELLS[i] + at as usize
    })
}

fn main() {
    let start = std::time::Instant::now();
    let mut rng = StdRng::seed_from_u64(1);
    let mut table = vec![[0.0_f64; 2]; CELLS.iter().product()];
    let mut returns: Vec<f64> = Vec::new();
    for episode in 1..=EPISODES {
        // Less is tried and learned as time goes by.
        let share = 1.0 - episode as f64 / EPISODES as f64;
        let (explored, rate) = (0.3 * share * share, 0.3 * share + 0.02);
        let mut cart = CartPole::new(&mut rng);
        let mut at = cell(&cart.state);
        loop {
            let best = table[at][1] > table[at][0];
            let right = if rng.random::<f64>() < explored { rng.random() } else { best };
            let end = cart.step(right);
            let next = cell(&cart.state);
            // The one-step target: nothing comes after a failure.
            let ahead = table[next][0].max(table[next][1]);
            let target = if end == End::Failed { 0.0 } else { 1.0 + GAMMA * ahead };
            let q = &mut table[at][usize::from(right)];
            *q += rate * (target - *q);
            at = next;
            if end != End::None {
                break;
            }
        }
        returns.push(cart.steps as f64);
        let last = &returns[returns.len().saturating_sub(100)..];
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        if episode % 2000 == 0 {
            println!("{episode:>6} episodes: mean return {mean:.1} of the last {}", last.len());
        }
        if last.len() == 100 && mean >= SOLVED {
            println!(
                "a mean return of {SOLVED} after {episode} episodes, in {:.1} s",
                start.elapsed().as_secs_f64()
            );
            return;
        }
    }
    println!("not there");
    std::process::exit(1);
}
