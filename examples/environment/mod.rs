//! The pole on a cart of Barto, Sutton and Anderson (1983), with Gym's constants.

use rand::Rng;

/// Position and speed of the cart, angle and angular speed of the pole.
pub type State = [f32; 4];

/// The longest episode, and the best return.
pub const MOST_STEPS: usize = 500;

/// A cart with a pole that is to stay upright. The reward is 1 a step.
pub struct CartPole {
    pub state: State,
    /// Steps of the episode.
    pub steps: usize,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It goes on.
    None,
    /// The pole has fallen, or the cart has left its track.
    Failed,
    /// Time is over; the state has a value still.
    Truncated,
}

impl CartPole {
    /// At rest, nearly.
    pub fn new(rng: &mut impl Rng) -> Self {
        Self { state: [(); 4].map(|()| rng.random_range(-0.05..0.05)), steps: 0 }
    }

    /// Pushes the cart to the right or to the left.
    pub fn step(&mut self, right: bool) -> End {
        const GRAVITY: f32 = 9.8;
        const POLE_MASS: f32 = 0.1;
        const MASS: f32 = 1.0 + POLE_MASS;
        const HALF_LENGTH: f32 = 0.5;
        const FORCE: f32 = 10.0;
        const SECONDS: f32 = 0.02;
        const FARTHEST: f32 = 2.4;
        const STEEPEST: f32 = 12.0 * std::f32::consts::PI / 180.0;

        let [x, speed, angle, turn] = self.state;
        let (sin, cos) = angle.sin_cos();
        let force = if right { FORCE } else { -FORCE };
        let pushed = (force + POLE_MASS * HALF_LENGTH * turn * turn * sin) / MASS;
        let turning = (GRAVITY * sin - cos * pushed)
            / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cos * cos / MASS));
        let moving = pushed - POLE_MASS * HALF_LENGTH * turning * cos / MASS;
        self.state = [
            x + SECONDS * speed,
            speed + SECONDS * moving,
            angle + SECONDS * turn,
            turn + SECONDS * turning,
        ];
        self.steps += 1;
        let [x, _, angle, _] = self.state;
        if x.abs() > FARTHEST || angle.abs() > STEEPEST {
            End::Failed
        } else if self.steps == MOST_STEPS {
            End::Truncated
        } else {
            End::None
        }
    }
}
