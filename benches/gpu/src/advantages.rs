//! The advantages op: GRPO, with the advantages of tokens and the statistics.

use ppo_kernels::advantages::cuda::{self, Inputs, Outputs};
use ppo_kernels::advantages::{AdvantageOptions, AdvantageStats, Sizes};

use crate::gpu::Buffer;
use crate::inputs::{mask, tokens};
use crate::table::{Pass, Shape, Table};

const SHAPES: [(usize, usize); 3] = [(4096, 32), (4096, 2048), (65_536, 128)];

/// Rows of a group.
const SIZE: usize = 8;

pub fn time(table: &Table) {
    for (batch, seq_len) in SHAPES {
        time_shape(table, batch, seq_len);
    }
}

struct Set {
    scores: Buffer<f32>,
    ids: Buffer<i64>,
    mask: Buffer<u8>,
    advantages: Buffer<f32>,
    token_advantages: Buffer<f32>,
    stats: Buffer<AdvantageStats>,
    workspace: Buffer<f64>,
}

impl Set {
    fn new(batch: usize, seq_len: usize) -> Self {
        // Groups of which the rows stand far apart.
        let groups = (batch / SIZE) as i64;
        let ids: Vec<i64> = (0..batch as i64).map(|row| row % groups * 7919).collect();
        Self {
            scores: tokens(0, batch),
            ids: Buffer::new(&ids, 0),
            mask: mask(batch, seq_len),
            advantages: Buffer::uninit(batch, 0),
            token_advantages: Buffer::uninit(batch * seq_len, 0),
            stats: Buffer::uninit(1, 0),
            workspace: Buffer::uninit(cuda::workspace_len(batch), 0),
        }
    }
}

fn time_shape(table: &Table, batch: usize, seq_len: usize) {
    if !table.wants(&[Pass::Advantages, Pass::AdvantagesByIds], "f32") {
        return;
    }
    let (stream, count) = (table.stream(), batch * seq_len);
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };
    let grpo = |set: &mut Set, by_ids: bool| {
        let inputs = Inputs {
            groups: by_ids.then(|| set.ids.slice()),
            mask: Some(set.mask.slice()),
            ..Inputs::new(set.scores.slice())
        };
        let outputs = Outputs {
            advantages: set.advantages.slice_mut(),
            token_advantages: Some(set.token_advantages.slice_mut()),
            stats: Some(set.stats.slice_mut()),
        };
        let sizes = Sizes { batch, seq_len, group_size: if by_ids { 0 } else { SIZE } };
        let (options, workspace) = (AdvantageOptions::grpo(), set.workspace.slice_mut());
        cuda::outcome_advantages(&stream, inputs, sizes, &options, outputs, workspace).unwrap();
    };
    let sets = &mut table.sets(5 * count, || Set::new(batch, seq_len));
    table.row(Pass::Advantages, shape, 5 * count + 8 * batch, sets, |set| grpo(set, false));
    table.row(Pass::AdvantagesByIds, shape, 5 * count + 16 * batch, sets, |set| grpo(set, true));
}
