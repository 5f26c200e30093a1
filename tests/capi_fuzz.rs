//! The C functions for the CPU on random calls: right ones against the f64 references, and the same calls
//! with one thing wrong, which must be refused or go well. All memory of a call ends or begins at a page
//! that cannot be touched, several threads call at a time, and one of them moves the work between the
//! pool and a team. `PPOK_FUZZ_CASE=123` runs that case alone.
#![cfg(all(unix, target_pointer_width = "64", feature = "capi"))]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_uint, c_void, CStr};
use std::fmt::Debug;
use std::io::Write;
use std::ops::RangeInclusive;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytemuck::Pod;
use common::{
    advantages_cases, assert_close, correction_cases, gae_cases, logits_loss_cases, ppo_loss_cases,
    preference_cases, rng, wide,
};
use half::{bf16, f16};
use ppo_kernels::advantages::{
    capi::*, AdvantageOptions, AdvantageStats, Baseline, Singleton, Sizes, TokenBaselineOptions,
    TokenStep,
};
use ppo_kernels::capi::{functions::*, *};
use ppo_kernels::correction::{
    self, capi::*, CorrectionOptions, CorrectionStats, Rejection, RejectionLevel, RejectionMetric,
    WeightLevel,
};
use ppo_kernels::cpu::Logit;
use ppo_kernels::gae::{self, capi::*, GaeOptions, RewardShaping, ScoreScale};
use ppo_kernels::kl::{self, capi::*, FullKlOptions, KlEstimator, KlOptions};
use ppo_kernels::logprob::{self, capi::*, LogprobOptions};
use ppo_kernels::moments::Moments;
use ppo_kernels::ppo_loss::{
    self, capi::*, Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, PpoLossOptions,
    PpoStats, RatioGradient, RatioLevel, Surrogate, TrustRegion, TrustRegionSides,
};
use ppo_kernels::preference::{
    self, capi::*, FDivergence, PreferenceLoss, PreferenceOptions, PreferenceStats,
    RewardModelOptions,
};
use ppo_kernels::tolerance::{self, Tolerance};
use ppo_kernels::whiten::{self, capi::*, EpsPlacement, WhitenOptions};
use rand::rngs::StdRng;
use rand::Rng;

/// Right calls of all threads together.
const CALLS: usize = 20_000;
const THREADS: usize = 4;

/// Cases of the first thread between two switches of who does the work.
const SWITCH: u64 = 200;

/// What outputs are full of before a call, which no result is made of.
const UNWRITTEN: u8 = 0xfe;

/// The passes; each may make several calls.
const PASSES: [fn(&mut Fuzz); 15] = [
    logprob,
    logprob_of_a_tile,
    token_kl,
    full_kl,
    gae,
    advantages,
    optimal_token_baseline,
    whiten_moments,
    whiten_with,
    correction,
    ppo_loss,
    ppo_loss_scale,
    logits_ppo_loss,
    preference_loss,
    reward_model_loss,
];

#[test]
fn calls_are_right_or_refused() {
    name_cases_on_faults();
    if let Ok(case) = std::env::var("PPOK_FUZZ_CASE") {
        Fuzz::new().case(0, case.parse().unwrap());
        return;
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    std::thread::scope(|scope| {
        let threads = [0, 1, 2, 3].map(|thread| scope.spawn(move || fuzz(thread)));
        for thread in threads {
            for (name, count) in thread.join().expect("no case failed") {
                *counts.entry(name).or_default() += count;
            }
        }
    });
    println!("{counts:#?}");
}

fn fuzz(thread: usize) -> BTreeMap<&'static str, usize> {
    let mut fuzz = Fuzz::new();
    for n in 0_u64.. {
        if thread == 0 && n.is_multiple_of(SWITCH) {
            let with_team = (n / SWITCH).is_multiple_of(2);
            // SAFETY: it is a team.
            unsafe { ppok_set_team(with_team.then_some(team)) };
        }
        fuzz.case(thread, 1_000_000 * thread as u64 + n);
        if fuzz.right >= CALLS / THREADS {
            break;
        }
    }
    fuzz.counts
}

/// A team of three threads, of which one is the caller's.
unsafe extern "C" fn team(
    work: unsafe extern "C" fn(*mut c_void),
    state: *mut c_void,
    _threads: c_uint,
    _flags: c_uint,
) {
    let state = state as usize;
    std::thread::scope(|scope| {
        // SAFETY: the caller's.
        let work = move || unsafe { work(state as *mut c_void) };
        (1..3).for_each(|_| drop(scope.spawn(work)));
        work();
    });
}

/// The case that each thread is at.
static CASES: [AtomicU64; THREADS] = [const { AtomicU64::new(0) }; THREADS];

/// A fault ends the process: what is known of it is said before.
fn name_cases_on_faults() {
    extern "C" fn report(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        let (mut text, cases) = ([0; 256], CASES.each_ref().map(|case| case.load(Relaxed)));
        // SAFETY: the system's.
        let at = unsafe { (*info).si_addr() };
        let mut rest = &mut text[..];
        let _ = writeln!(rest, "signal {signal} at {at:p} in one of PPOK_FUZZ_CASE={cases:?}");
        let len = 256 - rest.len();
        // SAFETY: it has so many bytes.
        unsafe { libc::write(2, text.as_ptr().cast(), len) };
    }
    // SAFETY: zeros are an empty mask; then the fault is met again, without a handler.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = report as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT] {
            assert_eq!(libc::sigaction(signal, &action, null_mut()), 0);
        }
    }
}

/// An array, or a struct of options, of the case.
struct Array {
    at: usize,
    /// Bytes of an element.
    unit: usize,
    written: bool,
    /// What is there before a call, and in inputs after it too.
    before: Vec<u8>,
}

impl Array {
    fn bytes(&self) -> usize {
        self.before.len()
    }

    fn now(&self) -> &[u8] {
        // SAFETY: it is memory of a slot, which no call is at work on.
        unsafe { std::slice::from_raw_parts(self.at as *const u8, self.bytes()) }
    }

    /// Of a struct.
    fn words(&self) -> Vec<u64> {
        let words = self.before.chunks_exact(8);
        words.map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    fn restore(&self) {
        // SAFETY: as above.
        unsafe { (self.at as *mut u8).copy_from(self.before.as_ptr(), self.bytes()) };
    }
}

/// The last struct of options: which of the arrays it is, its 8-byte words in this version, how many
/// of its words must be finite numbers whatever else is given, and how many words at the end are
/// pairs of choices.
#[derive(Clone, Copy)]
struct OptionsAt {
    array: usize,
    words: usize,
    finite: (usize, usize),
    pairs: usize,
}

/// An array that is written.
#[derive(Clone, Copy)]
struct Out {
    at: usize,
    len: usize,
    /// As the header numbers types of logits.
    kind: i32,
}

impl Out {
    fn read<T: Pod>(self) -> Vec<T> {
        // SAFETY: any bytes are such a number.
        unsafe { std::slice::from_raw_parts(self.at as *const T, self.len) }.to_vec()
    }

    fn wide(self) -> Vec<f64> {
        match self.kind {
            PPOK_F16 => self.read::<f16>().iter().map(|x| x.to_f64()).collect(),
            PPOK_BF16 => self.read::<bf16>().iter().map(|x| x.to_f64()).collect(),
            _ => wide(&self.read::<f32>()),
        }
    }
}

/// Null where it is not wanted.
fn at<T>(out: impl Into<Option<Out>>) -> *mut T {
    out.into().map_or(null_mut(), |out| out.at as *mut T)
}

/// A function of the header.
type Function<A> = unsafe extern "C" fn(*const A) -> i32;

/// One thread's cases.
struct Fuzz {
    rng: StdRng,
    /// Slots that no array is in, by their size: all stay mapped.
    free: HashMap<usize, Vec<usize>>,
    used: Vec<(usize, usize)>,
    arrays: Vec<Array>,
    options: Option<OptionsAt>,
    /// Where all structs of options are, which the library cannot see.
    options_at: Vec<u64>,
    /// Where offsets are, and options of numbers for rows, without which other arrays would have to be longer.
    needed_at: Vec<u64>,
    /// The case, for messages.
    what: String,
    right: usize,
    counts: BTreeMap<&'static str, usize>,
}

/// Memory.
impl Fuzz {
    fn new() -> Self {
        Self {
            rng: rng(0),
            free: HashMap::new(),
            used: Vec::new(),
            arrays: Vec::new(),
            options: None,
            options_at: Vec::new(),
            needed_at: Vec::new(),
            what: String::new(),
            right: 0,
            counts: BTreeMap::new(),
        }
    }

    /// So many bytes that end at a page that cannot be touched, or begin behind one.
    fn place(&mut self, bytes: usize) -> usize {
        // SAFETY: a question.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let room = bytes.next_power_of_two().max(page);
        // SAFETY: nobody has the new pages; all but the first and the last are made accessible.
        let map = || unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
            let pages = libc::mmap(null_mut(), room + 2 * page, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(pages, libc::MAP_FAILED);
            let inner = pages.byte_add(page);
            assert_eq!(libc::mprotect(inner, room, libc::PROT_READ | libc::PROT_WRITE), 0);
            inner as usize
        };
        let start = self.free.entry(room).or_default().pop().unwrap_or_else(map);
        self.used.push((room, start));
        start + if self.coin(0.5) { room - bytes } else { 0 }
    }

    fn add(&mut self, before: Vec<u8>, unit: usize, written: bool) -> usize {
        let at = self.place(before.len());
        self.arrays.push(Array { at, unit, written, before });
        self.arrays.last().unwrap().restore();
        at
    }

    fn put<T: Pod>(&mut self, values: &[T]) -> *const T {
        self.add(bytemuck::cast_slice(values).to_vec(), size_of::<T>(), false) as *const T
    }

    /// Null where there are none.
    fn put_some<T: Pod>(&mut self, values: Option<&[T]>) -> *const T {
        values.map_or(null(), |values| self.put(values))
    }

    fn put_offsets(&mut self, offsets: Option<&[i64]>) -> *const i64 {
        let at = self.put_some(offsets);
        self.needed_at.push(at as u64);
        at
    }

    /// Logits in one of their types, and what they are then.
    fn put_logits(&mut self, kind: i32, values: &[f32]) -> (*const c_void, Vec<f64>) {
        match kind {
            PPOK_F16 => {
                let values: Vec<_> = values.iter().map(|&x| f16::from_f32(x)).collect();
                (self.put(&values).cast(), values.iter().map(|x| x.to_f64()).collect())
            }
            PPOK_BF16 => {
                let values: Vec<_> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                (self.put(&values).cast(), values.iter().map(|x| x.to_f64()).collect())
            }
            _ => (self.put(values).cast(), wide(values)),
        }
    }

    fn out(&mut self, kind: i32, len: usize) -> Out {
        let unit = if kind == PPOK_F32 { 4 } else { 2 };
        Out { at: self.add(vec![UNWRITTEN; unit * len], unit, true), len, kind }
    }

    /// An output that is wanted or not.
    fn some_out(&mut self, kind: i32, len: usize) -> Option<Out> {
        self.coin(0.7).then(|| self.out(kind, len))
    }

    /// A result that is a struct of doubles.
    fn out_struct<T>(&mut self) -> Out {
        let bytes = vec![UNWRITTEN; size_of::<T>()];
        Out { at: self.add(bytes, 8, true), len: 1, kind: PPOK_F32 }
    }

    /// Options that `set` has changed, or null, which leaves the op's own at their defaults too.
    fn put_options<O>(
        &mut self,
        init: unsafe extern "C" fn(*mut O, usize) -> i32,
        (finite, pairs): (RangeInclusive<usize>, usize),
        set: impl FnOnce(&mut Self, &mut O),
    ) -> *const O {
        self.options = None;
        if self.coin(0.2) {
            return null();
        }
        // Sometimes those of a later version.
        let bytes = size_of::<O>() + self.one(&[0, 0, 0, 8, 24]);
        let options = self.add(vec![UNWRITTEN; bytes], 8, false) as *mut O;
        self.options_at.push(options as u64);
        // SAFETY: there is as much room.
        unsafe {
            assert_eq!(init(options, bytes), PPOK_STATUS_OK);
            set(self, &mut *options);
        }
        let array = self.arrays.iter().position(|array| array.at == options as usize).unwrap();
        self.arrays[array].before = self.arrays[array].now().to_vec();
        let words = size_of::<O>() / 8;
        self.options =
            Some(OptionsAt { array, words, finite: (*finite.start(), *finite.end()), pairs });
        options
    }
}

/// Calls.
impl Fuzz {
    fn case(&mut self, thread: usize, case: u64) {
        CASES[thread].store(case, Relaxed);
        self.rng = rng(case);
        self.what = format!("PPOK_FUZZ_CASE={case}");
        PASSES[case as usize % PASSES.len()](self);
        for (room, start) in self.used.drain(..) {
            self.free.get_mut(&room).unwrap().push(start);
        }
        self.arrays.clear();
        self.options_at.clear();
        self.needed_at.clear();
    }

    /// Makes a call and the same one with something wrong. Of a call that went well, as it should if that
    /// is what is `expected`, returns what `compare` makes of the outputs.
    fn call<A: Copy + Debug, R>(
        &mut self,
        name: &'static str,
        function: Function<A>,
        sizes: usize,
        args: A,
        expected: i32,
        compare: impl FnOnce(&Self, &str) -> R,
    ) -> Option<R> {
        // SAFETY: of numbers and pointers, without padding.
        let words = unsafe {
            std::slice::from_raw_parts((&raw const args).cast::<u64>(), size_of::<A>() / 8)
        };
        let mut words = words.to_vec();
        let given = words.len();
        words.resize(given + self.one(&[0, 0, 0, 1, 3]), 0);
        words[0] = 8 * words.len() as u64;
        let options = self.options.map(|options| self.arrays[options.array].words());
        let what = format!("{}: {} {args:x?}, options {options:x?}", self.what, name);

        let status = self.run(function, &words, |at| at, &what);
        assert_eq!(status, expected, "{what}: {}", last_error());
        self.right += 1;
        *self.counts.entry(name).or_default() += 1;
        let result = (status == PPOK_STATUS_OK).then(|| compare(self, &what));

        if self.coin(0.5) {
            words.truncate(given);
            words[0] = size_of::<A>() as u64;
            let options = self.options.map(|options| self.arrays[options.array].before.clone());
            let (how, address, must_be_refused) = self.spoil(name, sizes, &mut words);
            let what = format!("{what}, but {how}: {words:x?}");
            let status = self.run(function, &words, address, &what);
            assert!(status != PPOK_STATUS_OK || !must_be_refused, "{what}");
            *self.counts.entry("spoiled").or_default() += 1;
            *self.counts.entry("refused").or_default() += usize::from(status != PPOK_STATUS_OK);
            if let Some((options, before)) = self.options.zip(options) {
                self.arrays[options.array].before = before;
            }
        }
        self.arrays.iter().for_each(Array::restore);
        result
    }

    /// Calls with arguments of those words, from the address on that `address` makes of theirs, and checks
    /// what is not written.
    fn run<A>(
        &mut self,
        function: Function<A>,
        words: &[u64],
        address: fn(usize) -> usize,
        what: &str,
    ) -> i32 {
        self.arrays.iter().for_each(Array::restore);
        let args = self.add(bytemuck::cast_slice(words).to_vec(), 8, false);
        // SAFETY: the arguments are right, or wrong in a way that the library has to see.
        let status = unsafe { function(address(args) as *const A) };
        let refused = status != PPOK_STATUS_OK;
        assert!(!refused || !last_error().is_empty(), "{what}: no words for {status}");
        assert_ne!(status, PPOK_STATUS_INTERNAL, "{what}: {}", last_error());
        for array in self.arrays.iter().filter(|array| refused || !array.written) {
            let at = array.at;
            assert!(
                array.now() == array.before,
                "{what}: status {status}, but {at:#x} was written"
            );
        }
        status
    }

    /// Makes one thing wrong. Returns what, which address the arguments are then given by, and whether that
    /// must be refused.
    fn spoil(
        &mut self,
        name: &str,
        sizes: usize,
        words: &mut Vec<u64>,
    ) -> (&'static str, fn(usize) -> usize, bool) {
        let same = |at| at;
        let array_at = |word: u64| self.arrays.iter().find(|array| array.at as u64 == word);
        // Of every pointer its index, the bytes of the array and of an element, and whether it is written.
        // The last of equal ones is the output.
        let pointers: Vec<_> = (1 + sizes..words.len())
            .filter_map(|i| array_at(words[i]).map(|x| (i, x.bytes(), x.unit, x.written)))
            .filter(|&(i, ..)| !words[i + 1..].contains(&words[i]))
            .collect();
        loop {
            match self.rng.random_range(0..12) {
                0 => {
                    words[0] = self.one(&[0, 8, words[0] - 8, words[0] - 1, 4097, u64::MAX]);
                    return ("struct_size", same, true);
                }
                1 => {
                    words.push(1);
                    words[0] += 8;
                    return ("a later version's field", same, true);
                }
                2 => return ("misaligned arguments", |at| at + 1, true),
                3 => return ("no arguments", |_| 0, true),
                4 => {
                    let i = self.rng.random_range(1..=sizes);
                    words[i] = self.one(&[1 << 62, (1 << 62) + 5, 1 << 63, u64::MAX]);
                    let any = words[1..=sizes].iter().all(|&size| size != 0);
                    return ("a huge size", same, any);
                }
                5 if ["logprob", "kl_full", "logits"]
                    .iter()
                    .any(|start| name.starts_with(start)) =>
                {
                    self.spoil_choice(&mut words[1 + sizes]);
                    return ("a type", same, true);
                }
                6 => {
                    let (i, bytes, unit, _) = self.one(&pointers);
                    if unit > 1 {
                        words[i] += 1;
                        return ("a misaligned array", same, bytes > 0);
                    }
                }
                7 => {
                    let (i, ..) = self.one(&pointers);
                    if !self.needed_at.contains(&words[i]) {
                        words[i] = 0;
                        return ("no array", same, false);
                    }
                }
                8 => {
                    let (i, bytes, _, written) = self.one(&pointers);
                    let (other, other_bytes, ..) = self.one(&pointers);
                    let an_option = self.options_at.contains(&words[other]);
                    // Gradients may be scaled where they are, and take the place of logits.
                    let in_place = match name {
                        "ppo_loss_scale" => i == other + 3,
                        "logprob_backward" => other == 1 + sizes + 1,
                        _ => false,
                    };
                    if written
                        && !in_place
                        && !an_option
                        && i != other
                        && bytes > 0
                        && other_bytes > 0
                    {
                        words[i] = words[other];
                        return ("an overlap", same, true);
                    }
                }
                choice => {
                    // Options need not have a choice.
                    let given = self.options.filter(|of| matches!(choice, 9 | 10) || of.pairs > 0);
                    let Some(OptionsAt { array, words, finite, pairs }) = given else {
                        continue;
                    };
                    let (how, i) = match choice {
                        9 => ("struct_size of options", 0),
                        10 => ("an option not finite", self.rng.random_range(finite.0..=finite.1)),
                        _ => ("an option's choice", self.rng.random_range(words - pairs..words)),
                    };
                    let not_finite = self.one(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
                    let size = self.one(&[0, 8 * words as u64 - 1, 4097, u64::MAX]);
                    let mut word = self.arrays[array].words()[i];
                    match choice {
                        9 => word = size,
                        10 => word = not_finite.to_bits(),
                        _ => self.spoil_choice(&mut word),
                    }
                    self.arrays[array].before[8 * i..][..8].copy_from_slice(&word.to_ne_bytes());
                    return (how, same, true);
                }
            }
        }
    }

    /// Makes one of a pair of choices one that there is not.
    fn spoil_choice(&mut self, pair: &mut u64) {
        let wrong = self.one(&[-1, 99, i32::MIN, i32::MAX]) as u32;
        let shift = self.one(&[0, 32]);
        *pair = *pair & !(0xffff_ffff << shift) | u64::from(wrong) << shift;
    }
}

fn last_error() -> String {
    // SAFETY: the text ends in zero.
    unsafe { CStr::from_ptr(ppok_last_error()) }.to_string_lossy().into_owned()
}

/// Compares an output that is wanted.
fn close(what: &str, name: &str, got: impl Into<Option<Out>>, want: &[f64], within: Tolerance) {
    if let Some(got) = got.into() {
        assert_close(&format!("{what}: {name}"), &got.wide(), want, within.rel, within.abs);
    }
}

/// The tolerance of gradients in a type of logits.
fn rounded(tolerance: Tolerance, kind: i32) -> Tolerance {
    match kind {
        PPOK_F16 => tolerance.rounded_to_f16(),
        PPOK_BF16 => tolerance.rounded_to_bf16(),
        _ => tolerance,
    }
}

/// Leaves NaN where the mask, of one byte a `width` of numbers, is 0.
fn hide(mask: Option<&[u8]>, width: usize, x: &mut [f32]) {
    for (i, _) in mask.unwrap_or_default().iter().enumerate().filter(|(_, &m)| m == 0) {
        x[i * width..][..width].fill(f32::NAN);
    }
}

/// What is drawn.
impl Fuzz {
    fn coin(&mut self, share: f64) -> bool {
        self.rng.random_bool(share)
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.rng.random_range(0..of.len())]
    }

    /// A choice, as the header numbers it too.
    fn choice<T: Copy>(&mut self, of: &[T]) -> (i32, T) {
        let i = self.rng.random_range(0..of.len());
        (i as i32, of[i])
    }

    /// A number that may be left out, as the header has it too.
    fn maybe(&mut self, of: &[f64]) -> (f64, Option<f64>) {
        let number = self.coin(0.5).then(|| self.one(of));
        (number.unwrap_or(PPOK_NONE), number)
    }

    fn some<T>(&mut self, x: T) -> Option<T> {
        self.coin(0.7).then_some(x)
    }

    /// Rows and tokens of a row: few, none, and enough for several threads.
    fn shape(&mut self) -> [usize; 2] {
        let rows = self.rng.random_range(1..=8);
        let width = self.one(&[8, 40, 200]);
        let width = self.rng.random_range(1..=width);
        match self.rng.random_range(0..100) {
            0 => [0, width],
            1 => [rows, 0],
            2 | 3 => [2 * rows, self.rng.random_range(17_000..24_000) / (2 * rows)],
            _ => [rows, width],
        }
    }

    /// Where rows begin in a pack of as many tokens, of which there are `seq_len` then, or nothing; and the
    /// status that it should have, since they may be wrong.
    fn offsets(&mut self, batch: usize, seq_len: &mut usize) -> (Option<Vec<i64>>, i32) {
        if self.coin(0.6) {
            return (None, PPOK_STATUS_OK);
        }
        *seq_len *= batch;
        let tokens = *seq_len as i64;
        let mut offsets: Vec<i64> =
            (0..=batch).map(|_| self.rng.random_range(0..=tokens)).collect();
        offsets.sort_unstable();
        (offsets[0], offsets[batch]) = (0, tokens);
        if !self.coin(0.05) {
            return (Some(offsets), PPOK_STATUS_OK);
        }
        let row = self.rng.random_range(0..=batch);
        offsets[row] = self.one(&[-1, tokens + 1, i64::MAX, i64::MIN]);
        (Some(offsets), PPOK_STATUS_OPTION)
    }

    /// Rows and vocabulary, likewise.
    fn logits_shape(&mut self) -> [usize; 2] {
        let [rows, vocab] = self.shape();
        match self.rng.random_range(0..100) {
            0 | 1 => [1, self.rng.random_range(33_000..70_000)],
            2 => [rows, 0],
            _ => [rows, vocab.max(1)],
        }
    }

    /// Multiples of 1/64, so that differences are exact, and not near to where a gradient jumps.
    fn numbers(&mut self, n: usize, centre: f32, spread: f32) -> Vec<f32> {
        let draw =
            |_| ((centre + spread * self.rng.random_range(-1.0..1.0f32)) * 64.0).round() / 64.0;
        (0..n).map(draw).collect()
    }

    /// Peaked rows with some columns of probability 0, rarely the first.
    fn logits(&mut self, [rows, vocab]: [usize; 2]) -> Vec<f32> {
        let offset = self.one(&[0.0, -30.0, 20.0]);
        let mut logits = self.numbers(rows * vocab, offset, 5.0);
        let forbidden = self.coin(0.3);
        for row in logits.chunks_mut(vocab.max(1)) {
            for _ in 0..2 {
                let i = self.rng.random_range(0..vocab);
                row[i] = offset + self.rng.random_range(8.0..20.0);
            }
            if forbidden {
                row.iter_mut().skip(1).step_by(5).for_each(|z| *z = f32::NEG_INFINITY);
            }
            if self.coin(0.01) {
                row[0] = self.one(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
            }
        }
        logits
    }

    /// A mask with padding and gaps, which may leave nothing over; any byte but 0 keeps.
    fn mask(&mut self, [rows, width]: [usize; 2]) -> Option<Vec<u8>> {
        if self.coin(0.4) {
            return None;
        }
        let mut mask = Vec::with_capacity(rows * width);
        for _ in 0..rows {
            let (start, keep) = (self.one(&[0, width / 4]), self.one(&[1.0, 0.7]));
            let end = self.one(&[width, width / 2 + 1, 0]);
            let byte = |t| match (start..end).contains(&t) && self.rng.random_bool(keep) {
                true => self.rng.random_range(1..=255),
                false => 0,
            };
            mask.extend((0..width).map(byte));
        }
        Some(mask)
    }
}

/// The op's options, and those for C.
fn logprob_options(f: &mut Fuzz, ignored: &[i64]) -> (LogprobOptions, *const ppok_logprob_options) {
    let mut own = LogprobOptions::default();
    let c = f.put_options(ppok_logprob_options_init, (1..=1, 1), |f, c| {
        own.temperature = f.one(&[1.0, 0.7, 1.6]);
        own.ignore_index = f.coin(0.5).then(|| f.one(ignored));
        c.temperature = own.temperature;
        c.ignore_index = own.ignore_index.unwrap_or(7);
        c.has_ignore_index = i32::from(own.ignore_index.is_some());
    });
    (own, c)
}

fn logprob(f: &mut Fuzz) {
    let [rows, vocab] = f.logits_shape();
    let (kind, targets_type) =
        (f.one(&[PPOK_F32, PPOK_F16, PPOK_BF16]), f.one(&[PPOK_U32, PPOK_I64]));
    let logits = f.logits([rows, vocab]);
    let (logits, z) = f.put_logits(kind, &logits);
    let ignored = if targets_type == PPOK_U32 { i64::from(u32::MAX) } else { -100 };
    let (own, options) = logprob_options(f, &[ignored, 0]);
    let mut targets: Vec<i64> =
        (0..rows).map(|_| f.rng.random_range(0..vocab.max(1) as i64)).collect();
    for target in &mut targets {
        *target = own.ignore_index.filter(|_| f.coin(0.1)).unwrap_or(*target);
    }
    let mut expected = if vocab == 0 { PPOK_STATUS_SHAPE } else { PPOK_STATUS_OK };
    if expected == PPOK_STATUS_OK && rows > 0 && f.coin(0.03) {
        targets[rows / 2] = f.one(&[vocab as i64, ignored - 1]);
        expected = PPOK_STATUS_TARGET;
    }
    let targets_at = match targets_type {
        PPOK_U32 => f.put(&targets.iter().map(|&id| id as u32).collect::<Vec<_>>()).cast(),
        _ => f.put(&targets).cast(),
    };
    let (logp, entropy) = (f.out(PPOK_F32, rows), f.some_out(PPOK_F32, rows));
    let max = f.some_out(PPOK_F32, rows);
    let log_sum = max.map(|_| f.out(PPOK_F32, rows));
    let args = ppok_logprob_forward_args {
        struct_size: 0, // the call sets it
        rows,
        vocab,
        logits_type: kind,
        targets_type,
        logits,
        targets: targets_at,
        options,
        logp: at(logp),
        entropy: at(entropy),
        max: at(max),
        log_sum: at(log_sum),
    };
    let left = f.call("logprob_forward", ppok_logprob_forward_cpu, 2, args, expected, |_, what| {
        let want = logprob::reference::forward(&z, &targets, vocab, &own);
        close(what, "logp", logp, &want.0, tolerance::LOGPROB.forward);
        close(what, "entropy", entropy, &want.1, tolerance::LOGPROB.forward);
        [entropy, max, log_sum].map(|out| out.map(Out::read::<f32>))
    });
    let Some([entropy, Some(max), Some(log_sum)]) = left else {
        return;
    };

    let up = [f.numbers(rows, 0.0, 1.0), f.numbers(rows, 0.0, 1.0)];
    let up_logp = f.some(up[0].as_slice());
    let up_entropy = entropy.as_ref().and_then(|_| f.some(up[1].as_slice()));
    let grad = f.out(kind, rows * vocab);
    let args = ppok_logprob_backward_args {
        struct_size: 0,
        rows,
        vocab,
        columns: 0,
        first_column: 0,
        logits_type: kind,
        targets_type,
        logits,
        targets: targets_at,
        max: f.put(&max),
        log_sum: f.put(&log_sum),
        entropy: f.put_some(entropy.as_deref()),
        grad_logp: f.put_some(up_logp),
        grad_entropy: f.put_some(up_entropy),
        options,
        grad_logits: at(grad),
    };
    f.call("logprob_backward", ppok_logprob_backward_cpu, 4, args, PPOK_STATUS_OK, |_, what| {
        let [g, h] = [up_logp, up_entropy].map(|up| up.map_or(vec![0.0; rows], wide));
        let want = logprob::reference::backward(&z, &targets, vocab, &own, &g, &h);
        let within = rounded(tolerance::LOGPROB.backward, kind);
        close(what, "grad_logits", grad, &want, within);
    });
}

/// Running sums of all the columns there are, in a vocabulary that may have others, and what they come to.
fn logprob_of_a_tile(f: &mut Fuzz) {
    let [rows, columns] = f.logits_shape();
    let kind = f.one(&[PPOK_F32, PPOK_F16, PPOK_BF16]);
    let logits = f.logits([rows, columns]);
    let (logits, z) = f.put_logits(kind, &logits);
    let (own, options) = logprob_options(f, &[-100]);
    let first_column = f.one(&[0, 0, 3, 70_000]);
    let vocab = first_column + columns + f.one(&[0, 0, 9]);
    let places: Vec<i64> =
        (0..rows).map(|_| f.rng.random_range(0..columns.max(1) as i64)).collect();
    let targets: Vec<i64> = places.iter().map(|place| place + first_column as i64).collect();
    let targets = f.put(&targets).cast();
    let expected = if columns == 0 { PPOK_STATUS_SHAPE } else { PPOK_STATUS_OK };
    let [max, rest, logit] = [(); 3].map(|()| f.out(PPOK_F32, rows));
    let weighted = f.some_out(PPOK_F32, rows);
    let args = ppok_logprob_partial_args {
        struct_size: 0, // the call sets it
        rows,
        columns,
        first_column,
        vocab,
        logits_type: kind,
        targets_type: PPOK_I64,
        begins: 1,
        reserved: 0,
        logits,
        targets,
        options,
        max: at(max),
        rest: at(rest),
        logit: at(logit),
        weighted: at(weighted),
    };
    let left = f.call("logprob_partial", ppok_logprob_partial_cpu, 4, args, expected, |_, _| {
        ([max, rest, logit].map(Out::read::<f32>), weighted.map(Out::read::<f32>))
    });
    let Some(([max, rest, logit], weighted)) = left else {
        return;
    };

    let (logp, log_sum) = (f.out(PPOK_F32, rows), f.out(PPOK_F32, rows));
    let entropy = weighted.as_ref().and_then(|_| f.some_out(PPOK_F32, rows));
    let args = ppok_logprob_finish_args {
        struct_size: 0,
        rows,
        vocab,
        targets_type: PPOK_I64,
        reserved: 0,
        targets,
        max: f.put(&max),
        rest: f.put(&rest),
        logit: f.put(&logit),
        weighted: f.put_some(weighted.as_deref()),
        options,
        logp: at(logp),
        log_sum: at(log_sum),
        entropy: at(entropy),
    };
    f.call("logprob_finish", ppok_logprob_finish_cpu, 2, args, PPOK_STATUS_OK, |_, what| {
        let own = LogprobOptions { ignore_index: None, ..own };
        let want = logprob::reference::forward(&z, &places, columns, &own);
        close(what, "logp", logp, &want.0, tolerance::LOGPROB.forward);
        close(what, "entropy", entropy, &want.1, tolerance::LOGPROB.forward);
    });
}

const ESTIMATORS: [KlEstimator; 5] = common::kl_cases::ESTIMATORS;

fn token_kl(f: &mut Fuzz) {
    let shape = f.shape();
    let tokens = shape[0] * shape[1];
    let mut own = KlOptions::default();
    let options = f.put_options(ppok_kl_token_options_init, (1..=2, 1), |f, c| {
        (c.estimator, own.estimator) = f.choice(&ESTIMATORS);
        (c.log_ratio_clamp, own.log_ratio_clamp) = f.maybe(&[0.7, 2.3]);
        (c.output_clamp, own.output_clamp) = f.maybe(&[0.33, 1.7]);
    });
    let mask = f.mask(shape);
    let mask = mask.as_deref();
    let [mut logp, mut ref_logp] = [f.numbers(tokens, -4.0, 2.0), f.numbers(tokens, -4.0, 2.0)];
    let mut up = f.numbers(tokens, 0.0, 1.0);
    [&mut logp, &mut ref_logp, &mut up].into_iter().for_each(|x| hide(mask, 1, x));
    let [x, y, g] = [&logp, &ref_logp, &up].map(|x| wide(x));
    let kl = f.out(PPOK_F32, tokens);
    let args = ppok_kl_token_forward_args {
        struct_size: 0,
        tokens,
        logp: f.put(&logp),
        ref_logp: f.put(&ref_logp),
        mask: f.put_some(mask),
        options,
        kl: at(kl),
    };
    f.call("kl_token_forward", ppok_kl_token_forward_cpu, 1, args, PPOK_STATUS_OK, |_, what| {
        let want = kl::reference::token_kl(&x, &y, mask, &own);
        close(what, "kl", kl, &want, tolerance::TOKEN_KL.tests);
    });

    let [grad_logp, grad_ref_logp] = [(); 2].map(|()| f.some_out(PPOK_F32, tokens));
    let args = ppok_kl_token_backward_args {
        struct_size: 0,
        tokens,
        logp: args.logp,
        ref_logp: args.ref_logp,
        mask: args.mask,
        grad_kl: f.put(&up),
        options,
        grad_logp: at(grad_logp),
        grad_ref_logp: at(grad_ref_logp),
    };
    f.call("kl_token_backward", ppok_kl_token_backward_cpu, 1, args, PPOK_STATUS_OK, |_, what| {
        let want = kl::reference::token_kl_backward(&x, &y, mask, &g, &own);
        for (grad, want) in [(grad_logp, want.0), (grad_ref_logp, want.1)] {
            close(what, "a gradient", grad, &want, tolerance::TOKEN_KL.tests);
        }
    });
}

fn full_kl(f: &mut Fuzz) {
    let [rows, vocab] = f.logits_shape();
    let kind = f.one(&[PPOK_F32, PPOK_F16, PPOK_BF16]);
    let mut own = FullKlOptions::default();
    let options = f.put_options(ppok_kl_full_options_init, (1..=1, 1), |f, c| {
        (c.divergence, own.divergence) = f.choice(&kl::Divergence::ALL);
        (own.beta, own.skew) = (f.one(&[0.5, 0.1, 0.9]), f.one(&[0.1, 0.6]));
        (c.beta, c.skew) = (own.beta, own.skew);
        own.temperature = f.one(&[1.0, 0.7, 1.6]);
        c.temperature = own.temperature;
    });
    let mask = f.mask([rows, 1]);
    let mask = mask.as_deref();
    let mut z = f.logits([rows, vocab]);
    let mut w: Vec<f32> = z.iter().map(|z| z + f.rng.random_range(-1.0..1.0)).collect();
    // Where the KL is infinite; in reverse it would only be large.
    if vocab > 0 && own.divergence == kl::Divergence::Forward && f.coin(0.05) {
        w.iter_mut().step_by(vocab).for_each(|w| *w = f32::NEG_INFINITY);
    }
    [&mut z, &mut w].into_iter().for_each(|x| hide(mask, vocab, x));
    let ((logits, z), (ref_logits, w)) = (f.put_logits(kind, &z), f.put_logits(kind, &w));
    let expected = if vocab == 0 { PPOK_STATUS_SHAPE } else { PPOK_STATUS_OK };
    let stats = f.out(PPOK_F32, PPOK_KL_FULL_STATS * rows);
    let args = ppok_kl_full_forward_args {
        struct_size: 0,
        rows,
        vocab,
        logits_type: kind,
        reserved: 0,
        logits,
        ref_logits,
        mask: f.put_some(mask),
        options,
        stats: at(stats),
    };
    let left = f.call("kl_full_forward", ppok_kl_full_forward_cpu, 2, args, expected, |_, what| {
        let want = kl::reference::full_kl(&z, &w, vocab, mask, &own);
        close(what, "kl", Out { len: rows, ..stats }, &want, tolerance::FULL_KL.forward);
        stats.read::<f32>()
    });
    let Some(stats) = left else {
        return;
    };

    let up = f.numbers(rows, 0.0, 1.0);
    let [grad_logits, grad_ref_logits] = [(); 2].map(|()| f.some_out(kind, rows * vocab));
    let args = ppok_kl_full_backward_args {
        struct_size: 0,
        rows,
        vocab,
        logits_type: kind,
        reserved: 0,
        logits,
        ref_logits,
        mask: args.mask,
        stats: f.put(&stats),
        grad_kl: f.put(&up),
        options,
        grad_logits: at(grad_logits),
        grad_ref_logits: at(grad_ref_logits),
    };
    f.call("kl_full_backward", ppok_kl_full_backward_cpu, 2, args, PPOK_STATUS_OK, |_, what| {
        let want = kl::reference::full_kl_backward(&z, &w, vocab, mask, &wide(&up), &own);
        let within = rounded(tolerance::FULL_KL.backward, kind);
        for (grad, want) in [(grad_logits, want.0), (grad_ref_logits, want.1)] {
            close(what, "a gradient", grad, &want, within);
        }
    });
}

fn gae(f: &mut Fuzz) {
    let [batch, mut seq_len] = f.shape();
    let masked = f.one(&gae_cases::ALL_MASKED);
    let sample = gae_cases::Sample::new(&mut f.rng, batch, seq_len, masked);
    let mut inputs = sample.inputs(false, masked != gae_cases::Masked::Nothing || f.coin(0.5));
    inputs.rewards = inputs.rewards.filter(|_| f.coin(0.7));
    inputs.kl = inputs.kl.filter(|_| f.coin(0.7));
    inputs.dones = inputs.dones.filter(|_| f.coin(0.7));
    inputs.bootstrap = inputs.bootstrap.filter(|_| f.coin(0.7));
    let mut own = GaeOptions::default();
    let options = f.put_options(ppok_gae_options_init, (1..=4, 2), |f, c| {
        own.gamma = f.one(&[1.0, 0.99, 0.9, 0.0]);
        // Of long rows the errors would add up.
        own.lambda = if seq_len > 2500 { 0.95 } else { f.one(&[1.0, 0.95, 0.5, 0.0]) };
        (c.gamma, c.lambda) = (own.gamma, own.lambda);
        (c.value_lambda, own.value_lambda) = f.maybe(&[0.9, 0.3]);
        (c.mask_mode, own.mask_mode) = f.choice(&[gae::MaskMode::Carry, gae::MaskMode::Multiply]);
        let RewardShaping {
            kl_coef,
            score_placement,
            score_scale,
            score_min,
            score_max,
            score_order,
            ..
        } = &mut own.shaping;
        *kl_coef = f.one(&[0.0, 0.05, 0.3]);
        c.kl_coef = *kl_coef;
        (c.score_placement, *score_placement) =
            f.choice(&[gae::ScorePlacement::LastToken, gae::ScorePlacement::AfterLastToken]);
        let std;
        (c.score_std, std) = f.maybe(&[0.5, 1.7]);
        c.score_mean = f.one(&[0.0, 0.4]);
        *score_scale = std.map(|std| ScoreScale { mean: c.score_mean, std });
        *score_min = f.one(&[f64::NEG_INFINITY, -1.5, 0.3]);
        *score_max = f.one(&[f64::INFINITY, 5.0, 0.3]);
        (c.score_min, c.score_max) = (*score_min, *score_max);
        (c.score_order, *score_order) =
            f.choice(&[gae::ScoreOrder::ScaleThenClip, gae::ScoreOrder::ClipThenScale]);
        c.missing_eos_value = f.one(&[1.0, -3.0]);
        (c.missing_eos, own.shaping.missing_eos) = f.choice(&[
            gae::MissingEos::Keep,
            gae::MissingEos::Subtract(c.missing_eos_value),
            gae::MissingEos::Replace(c.missing_eos_value),
        ]);
    });
    let needed = own.shaping.missing_eos != gae::MissingEos::Keep;
    inputs.scores = inputs.scores.filter(|_| needed || f.coin(0.7));
    inputs.has_eos = inputs.has_eos.filter(|_| needed || f.coin(0.7));
    let tokens = batch * seq_len;
    let (offsets, expected) = f.offsets(batch, &mut seq_len);
    inputs.offsets = offsets.as_deref();
    let lambdas: Vec<f32> = (0..batch).map(|_| f.one(&[0.0, 0.5, 0.9])).collect();
    inputs.lambda_per_row = f.coin(0.3).then_some(&lambdas);
    let [advantages, returns] = [(); 2].map(|()| f.out(PPOK_F32, tokens));
    let rewards = f.some_out(PPOK_F32, tokens);
    let moments = f.coin(0.7).then(|| f.out_struct::<Moments>());
    let args = ppok_gae_args {
        struct_size: 0,
        batch,
        seq_len,
        values: f.put(inputs.values),
        rewards: f.put_some(inputs.rewards),
        kl: f.put_some(inputs.kl),
        scores: f.put_some(inputs.scores),
        has_eos: f.put_some(inputs.has_eos),
        mask: f.put_some(inputs.mask),
        dones: f.put_some(inputs.dones),
        bootstrap: f.put_some(inputs.bootstrap),
        offsets: f.put_offsets(inputs.offsets),
        lambda_per_row: f.put_some(inputs.lambda_per_row),
        options,
        advantages: at(advantages),
        returns: at(returns),
        shaped_rewards: at(rewards),
        moments: at(moments),
    };
    f.call("gae", ppok_gae_cpu, 2, args, expected, |_, what| {
        let want = gae_cases::run_reference(&inputs, batch, seq_len, &own);
        let within = tolerance::GAE.forward;
        close(what, "advantages", advantages, &want.advantages, within);
        close(what, "returns", returns, &want.returns, within);
        close(what, "rewards", rewards, &want.rewards, within);
        if let Some(moments) = moments {
            close_moments(what, moments, want.moments, within);
        }
    });
}

fn close_moments(what: &str, got: Out, want: Moments, within: Tolerance) {
    let numbers = |of: Moments| [of.count, of.mean, of.m2 / of.count.max(1.0)];
    let (got, want) = (numbers(got.read()[0]), numbers(want));
    assert_close(&format!("{what}: moments"), &got, &want, within.rel, within.abs);
}

fn advantages(f: &mut Fuzz) {
    let [rows, seq_len] = f.shape();
    let grouping = f.one(&advantages_cases::GROUPINGS);
    let mut sample = advantages_cases::Sample::new(&mut f.rng, grouping, rows, seq_len);
    if f.coin(0.2) {
        (sample.sizes.seq_len, sample.mask) = (0, None);
    }
    let (offsets, of_offsets) = f.offsets(sample.sizes.batch, &mut sample.sizes.seq_len);
    sample.offsets = offsets;
    let mut own = AdvantageOptions::default();
    let options = f.put_options(ppok_advantages_options_init, (1..=1, 3), |f, c| {
        own.eps = f.one(&[0.0, 1e-4, 0.1]);
        own.score_min = f.one(&[f64::NEG_INFINITY, -1.5]);
        own.score_max = f.one(&[f64::INFINITY, 1.0]);
        (c.eps, c.score_min, c.score_max) = (own.eps, own.score_min, own.score_max);
        (c.baseline, own.baseline) = f.choice(&advantages_cases::BASELINES);
        (c.scale, own.scale) = f.choice(&advantages_cases::SCALES);
        (c.singleton, own.singleton) = f.choice(&[Singleton::Zero, Singleton::Keep]);
        (c.eps_placement, own.eps_placement) =
            f.choice(&[EpsPlacement::Variance, EpsPlacement::Std]);
        (c.unbiased, own.unbiased) = f.choice(&[false, true]);
    });
    let Sizes { batch, seq_len, group_size } = sample.sizes;
    let mut inputs = sample.inputs();
    let weighted = own.baseline == Baseline::LengthWeighted;
    inputs.lengths = inputs.lengths.filter(|_| weighted || f.coin(0.5));
    let grouped = inputs.groups.is_some() || group_size > 0;
    let expected = match sample.fits(&own) {
        true => of_offsets,
        false if grouped => PPOK_STATUS_OPTION,
        false => PPOK_STATUS_NULL_POINTER,
    };
    let advantages = f.out(PPOK_F32, batch);
    let tokens = f.out(PPOK_F32, sample.tokens());
    let stats = f.coin(0.7).then(|| f.out_struct::<AdvantageStats>());
    let args = ppok_advantages_args {
        struct_size: 0,
        batch,
        seq_len,
        group_size,
        scores: f.put(inputs.scores),
        groups: f.put_some(inputs.groups),
        lengths: f.put_some(inputs.lengths),
        score_baselines: f.put_some(inputs.score_baselines),
        mask: f.put_some(inputs.mask),
        offsets: f.put_offsets(inputs.offsets),
        options,
        advantages: at(advantages),
        token_advantages: at(tokens),
        stats: at(stats),
    };
    f.call("advantages", ppok_advantages_cpu, 3, args, expected, |_, what| {
        let want = advantages_cases::run_reference(&inputs, sample.sizes, &own);
        let within = tolerance::ADVANTAGES.forward;
        close(what, "advantages", advantages, &want.advantages, within);
        close(what, "token_advantages", tokens, &want.token_advantages, within);
        if let Some(stats) = stats {
            let [got, want] = [&stats.read()[0], &want.stats].map(advantages_cases::numbers);
            assert_close(&format!("{what}: stats"), &got, &want, within.rel, within.abs);
        }
    });
}

fn optimal_token_baseline(f: &mut Fuzz) {
    let [rows, seq_len] = f.shape();
    let number = f.rng.random_range(0..12);
    // In three groups where they are after each other.
    let mut tokens = advantages_cases::Tokens::new(&mut f.rng, 3 * rows, seq_len, number);
    let (offsets, of_offsets) = f.offsets(tokens.sizes.batch, &mut tokens.sizes.seq_len);
    tokens.offsets = offsets;
    let mut own = TokenBaselineOptions::default();
    let options = f.put_options(ppok_optimal_token_baseline_options_init, (1..=1, 1), |f, c| {
        own.eps = f.one(&[1e-8, 0.1]);
        c.eps = own.eps;
        (c.step, own.step) = f.choice(&[TokenStep::Column, TokenStep::Unmasked]);
        (c.lone_tail, own.lone_tail) = f.choice(&[false, true]);
    });
    let Sizes { batch, seq_len, group_size } = tokens.sizes;
    let inputs = tokens.inputs();
    let advantages = f.out(PPOK_F32, tokens.rewards.len());
    let returns = f.some_out(PPOK_F32, tokens.rewards.len());
    let args = ppok_optimal_token_baseline_args {
        struct_size: 0,
        batch,
        seq_len,
        group_size,
        rewards: f.put(inputs.rewards),
        logp: f.put(inputs.logp),
        log_sum_sq_probs: f.put(inputs.log_sum_sq_probs),
        groups: f.put_some(inputs.groups),
        weights: f.put_some(inputs.weights),
        mask: f.put_some(inputs.mask),
        offsets: f.put_offsets(inputs.offsets),
        options,
        advantages: at(advantages),
        returns: at(returns),
    };
    let pass = ppok_optimal_token_baseline_cpu;
    f.call("optimal_token_baseline", pass, 3, args, of_offsets, |_, what| {
        let want = advantages_cases::baseline_of_reference(&tokens, &own);
        let within = tolerance::TOKEN_BASELINE.tests;
        close(what, "advantages", advantages, &want[0], within);
        close(what, "returns", returns, &want[1], within);
    });
}

fn whiten_moments(f: &mut Fuzz) {
    let shape = f.shape();
    let elements = shape[0] * shape[1];
    let mask = f.mask(shape);
    let mask = mask.as_deref();
    let mut x = f.numbers(elements, 0.3, 2.0);
    hide(mask, 1, &mut x);
    let moments = f.out_struct::<Moments>();
    f.options = None;
    let args = ppok_whiten_moments_args {
        struct_size: 0,
        elements,
        x: f.put(&x),
        mask: f.put_some(mask),
        moments: at(moments),
    };
    f.call("whiten_moments", ppok_whiten_moments_cpu, 1, args, PPOK_STATUS_OK, |_, what| {
        let want = whiten::reference::masked_moments(&wide(&x), mask);
        close_moments(what, moments, want, tolerance::WHITEN.forward);
    });
}

/// The passes that are given moments.
fn whiten_with(f: &mut Fuzz) {
    let shape = f.shape();
    let elements = shape[0] * shape[1];
    let mut mask = f.mask(shape);
    let [mut x, mut up] = [f.numbers(elements, 0.3, 2.0), f.numbers(elements, 0.0, 1.0)];
    if elements > 1 && f.coin(0.9) {
        // Two that are apart, for a divisor that is not near to 0.
        x[..2].copy_from_slice(&[-1.0, 1.5]);
        mask.iter_mut().for_each(|mask| mask[..2].fill(1));
    } else {
        x.fill(0.25);
    }
    let mask = mask.as_deref();
    [&mut x, &mut up].into_iter().for_each(|x| hide(mask, 1, x));
    let [wide_x, g] = [&x, &up].map(|x| wide(x));
    let moments = whiten::reference::masked_moments(&wide_x, mask);
    let other = Moments { count: 100.0, mean: 0.2, m2: 150.0 };
    let mut own = WhitenOptions::default();
    let options = f.put_options(ppok_whiten_options_init, (1..=1, 2), |f, c| {
        own.eps = f.one(&[1e-8, 0.1]);
        c.eps = own.eps;
        (c.eps_placement, own.eps_placement) =
            f.choice(&[EpsPlacement::Variance, EpsPlacement::Std]);
        (c.unbiased, own.unbiased) = f.choice(&[false, true]);
        (c.shift_mean, own.shift_mean) = f.choice(&[false, true]);
    });
    let expected = |of: Moments| match of.count > f64::from(u8::from(own.unbiased)) {
        true => PPOK_STATUS_OK,
        false => PPOK_STATUS_MASK,
    };
    let within = tolerance::WHITEN.forward;
    let (x_at, mask_at, grad_y) = (f.put(&x), f.put_some(mask), f.put(&up));
    let given = f.one(&[moments, other]);
    let y = f.out(PPOK_F32, elements);
    let args = ppok_whiten_forward_args {
        struct_size: 0,
        elements,
        x: x_at,
        mask: mask_at,
        moments: f.put(&[given]),
        options,
        y: at(y),
    };
    f.call("whiten_forward", ppok_whiten_forward_cpu, 1, args, expected(given), |_, what| {
        let want = whiten::reference::masked_whiten_with(&wide_x, mask, &given, &own);
        close(what, "y", y, &want, within);
    });

    let grad_x = f.out(PPOK_F32, elements);
    let args = ppok_whiten_backward_args {
        struct_size: 0,
        elements,
        x: x_at,
        mask: mask_at,
        moments: f.put(&[moments]),
        grad_y,
        options,
        grad_x: at(grad_x),
    };
    f.call("whiten_backward", ppok_whiten_backward_cpu, 1, args, expected(moments), |_, what| {
        let want = whiten::reference::masked_whiten_backward(&wide_x, mask, &g, &own);
        close(what, "grad_x", grad_x, &want, tolerance::WHITEN.backward);
    });

    let given = f.one(&[moments, other]);
    let args = ppok_whiten_with_backward_args {
        struct_size: 0,
        elements,
        mask: mask_at,
        moments: f.put(&[given]),
        grad_y,
        options,
        grad_x: at(grad_x),
    };
    f.call(
        "whiten_with_backward",
        ppok_whiten_with_backward_cpu,
        1,
        args,
        expected(given),
        |_, what| {
            let want = whiten::reference::masked_whiten_with_backward(mask, &given, &g, &own);
            close(what, "grad_x", grad_x, &want, tolerance::WHITEN.backward);
        },
    );
}

/// A rule of rejections, and how the header has it.
fn a_rejection(f: &mut Fuzz) -> (Rejection, [i32; 2], [f64; 2]) {
    use {RejectionLevel as L, RejectionMetric as M};
    let (metric_number, metric) = f.choice(&[
        M::None,
        M::Ratio,
        M::K2,
        M::K3,
        M::ReverseK3,
        M::BinaryKl,
        M::BinaryKlMax,
        M::TotalVariation,
    ]);
    let (level_number, level) =
        f.choice(&[L::Token, L::SequenceMean, L::SequenceSum, L::SequenceMax]);
    let (low, high) = match metric {
        M::None => (None, None),
        M::Ratio => (Some(f.one(&[0.5, 0.9])), Some(f.one(&[1.2, 2.0]))),
        _ => (None, Some(f.one(&[0.02, 0.1, 1.0]))),
    };
    let rule = Rejection { metric, level, low, high };
    let bounds = [low, high].map(|bound| bound.unwrap_or(PPOK_NONE));
    (rule, [metric_number, level_number], bounds)
}

fn correction(f: &mut Fuzz) {
    let [batch, mut seq_len] = f.shape();
    let masked = f.coin(0.6);
    let mut own = CorrectionOptions::default();
    let options = f.put_options(ppok_correction_options_init, (1..=7, 4), |f, c| {
        (c.log_ratio_clamp, own.log_ratio_clamp) = f.maybe(&[20.0, 0.5]);
        (c.low, own.low) = f.maybe(&[0.3, 0.8]);
        (c.high, own.high) = f.maybe(&[1.1, 3.0]);
        (c.level, own.level) = f.choice(&[
            WeightLevel::Token,
            WeightLevel::SequenceMean,
            WeightLevel::SequenceSum,
            WeightLevel::None,
        ]);
        if own.level == WeightLevel::SequenceSum && own.log_ratio_clamp.is_none() {
            // f32 does not hold the product of a long row.
            c.log_ratio_clamp = 20.0;
            own.log_ratio_clamp = Some(20.0);
        }
        (c.outside, own.outside) =
            f.choice(&[correction::Outside::Truncate, correction::Outside::Zero]);
        (c.normalise, own.normalise) = f.choice(&[false, true]);
        let (rule, numbers, bounds) = a_rejection(f);
        own.rejection = rule;
        [c.rejection_metric, c.rejection_level] = numbers;
        [c.rejection_low, c.rejection_high] = bounds;
        let (rule, numbers, bounds) = a_rejection(f);
        own.second_rejection = rule;
        [c.second_rejection_metric, c.second_rejection_level] = numbers;
        [c.second_rejection_low, c.second_rejection_high] = bounds;
    });
    let mut data = correction_cases::rollout(&mut f.rng, batch, seq_len, masked);
    let (offsets, expected) = f.offsets(batch, &mut seq_len);
    (data.seq_len, data.offsets) = (seq_len, offsets);
    if expected == PPOK_STATUS_OK {
        data = correction_cases::clear_of_bounds(data, &own);
    }
    let tokens = data.old_logp.len();
    let weights = f.out(PPOK_F32, tokens);
    let stats = f.out_struct::<CorrectionStats>();
    let kept = f.coin(0.7).then(|| Out {
        at: f.add(vec![UNWRITTEN; tokens], 1, true),
        len: tokens,
        kind: PPOK_F32,
    });
    let args = ppok_correction_args {
        struct_size: 0,
        batch,
        seq_len,
        old_logp: f.put(&data.old_logp),
        rollout_logp: f.put(&data.rollout_logp),
        mask: f.put_some(data.mask.as_deref()),
        offsets: f.put_offsets(data.offsets.as_deref()),
        options,
        weights: at(weights),
        stats: at(stats),
        kept: at(kept),
    };
    f.call("correction", ppok_correction_cpu, 2, args, expected, |_, what| {
        let found = correction_cases::Found {
            weights: weights.read(),
            kept: kept.map_or_else(|| data.reference(&own).kept, |kept| kept.read()),
            stats: stats.read()[0],
        };
        correction_cases::check(what, &data, &own, &found);
    });
}

/// Other policy terms than the clipped surrogate of tokens, and other KL terms.
fn a_member_of_the_family(f: &mut Fuzz, own: &mut PpoLossOptions) {
    let name = f.one(&PpoLossOptions::NAMES);
    let member = PpoLossOptions::of(name).unwrap();
    *own = PpoLossOptions {
        clip_range: f.one(&[member.clip_range, own.clip_range]),
        clip_range_high: f.one(&[member.clip_range_high, own.clip_range_high]),
        surrogate: member.surrogate,
        ratio: member.ratio,
        ratio_gradient: f.one(&[RatioGradient::Spread, RatioGradient::OwnToken]),
        trust_region: f.one(&[
            TrustRegion::None,
            TrustRegion::TotalVariation,
            TrustRegion::BinaryKl,
            TrustRegion::Ratio,
        ]),
        trust_region_low: f.one(&[0.2, 0.05]),
        trust_region_high: f.one(&[0.2, 0.03]),
        trust_region_sides: f.one(&[TrustRegionSides::ByAdvantage, TrustRegionSides::Both]),
        off_policy_threshold: f.one(&[None, Some(0.05)]),
        kl_against: f.one(&[KlAgainst::Reference, KlAgainst::Old, KlAgainst::Rollout]),
        kl_gradient: f.one(&[KlGradient::Own, KlGradient::Reverse]),
        kl_ratio: f.one(&[KlRatio::Gradient, KlRatio::Term]),
        kl_ratio_cap: f.one(&[None, Some(1.5)]),
        kl_weighted: f.coin(0.5),
        entropy_own_mean: f.coin(0.3),
        advantages_per_row: f.coin(0.3),
        weights_per_row: f.coin(0.3),
        row_extremes: f.coin(0.3),
        dual_clip: own.dual_clip.filter(|_| member.surrogate == Surrogate::Clip),
        clip_fraction: match member.surrogate {
            Surrogate::LogClip => ClipFractionKind::ClippedBranch,
            _ => own.clip_fraction,
        },
        ..*own
    };
}

fn ppo_loss(f: &mut Fuzz) {
    let [batch, mut seq_len] = f.shape();
    let n = batch * seq_len;
    let mut own = PpoLossOptions::default();
    let options = f.put_options(ppok_ppo_loss_options_init, (3..=10, 8), |f, c| {
        own.clip_range = f.one(&[0.2, 0.1, 0.0]);
        c.clip_range = own.clip_range;
        (c.clip_range_high, own.clip_range_high) = f.maybe(&[0.3]);
        (c.dual_clip, own.dual_clip) = f.maybe(&[2.0, 3.0]);
        (c.log_ratio_clamp, own.log_ratio_clamp) = f.maybe(&[0.7, 20.0]);
        (c.value_clip_range, own.value_clip_range) = f.maybe(&[0.2, 0.45]);
        (own.value_coef, own.entropy_coef) = (f.one(&[0.0, 0.1]), f.one(&[0.0, 0.03]));
        own.kl_coef = f.one(&[0.0, 0.2]);
        (c.value_coef, c.entropy_coef, c.kl_coef) = (own.value_coef, own.entropy_coef, own.kl_coef);
        (c.kl_log_ratio_clamp, own.kl.log_ratio_clamp) = f.maybe(&[0.7, 20.0]);
        (c.kl_output_clamp, own.kl.output_clamp) = f.maybe(&[0.33]);
        (c.kl_estimator, own.kl.estimator) = f.choice(&ESTIMATORS);
        c.aggregation_divisor = 77.0;
        (c.aggregation, own.aggregation) = f.choice(&[
            Aggregation::TokenMean,
            Aggregation::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenMean,
            Aggregation::SeqMeanTokenSumNorm,
            Aggregation::Constant(c.aggregation_divisor),
            Aggregation::BatchMeanTokenSum,
            Aggregation::BatchMeanTokenMean,
            Aggregation::SeqMeanTokenSumNormRows,
        ]);
        if own.aggregation != Aggregation::Constant(c.aggregation_divisor) {
            (c.denominator, own.denominator) = f.maybe(&[123.0]);
        }
        (c.clip_fraction, own.clip_fraction) =
            f.choice(&[ClipFractionKind::ClippedBranch, ClipFractionKind::RatioOutside]);
        if f.coin(0.5) {
            a_member_of_the_family(f, &mut own);
            let struct_size = c.struct_size;
            *c = ppok_ppo_loss_options { struct_size, ..ppo_loss_cases::c_options(&own) };
        }
    });
    let logp = f.numbers(n, -2.0, 1.5);
    let mut near = |x: &[f32], spread| -> Vec<f32> {
        x.iter().zip(f.numbers(n, 0.0, spread)).map(|(x, noise)| x + noise).collect()
    };
    let mut data = ppo_loss_cases::Data {
        batch,
        seq_len,
        old_logp: near(&logp, 0.8),
        ref_logp: Some(near(&logp, 0.9)),
        rollout_logp: Some(near(&logp, 0.9)),
        logp,
        advantages: f.numbers(n, 0.1, 1.5),
        values: Some(f.numbers(n, 0.5, 1.0)),
        old_values: Some(f.numbers(n, 0.5, 1.0)),
        returns: Some(f.numbers(n, 0.5, 1.5)),
        entropy: Some(f.numbers(n, 1.5, 1.4)),
        weights: Some(ppo_loss_cases::some_weights(&mut f.rng, n)),
        mask: f.mask([batch, seq_len]),
        offsets: None,
    };
    let (offsets, expected) = f.offsets(batch, &mut seq_len);
    (data.seq_len, data.offsets) = (seq_len, offsets);
    if data.mask.is_some() {
        data = ppo_loss_cases::with_nan_under_the_mask(&data);
    }
    data.ref_logp = data.ref_logp.filter(|_| own.kl_coef != 0.0 || f.coin(0.7));
    data.rollout_logp = data.rollout_logp.filter(|_| own.kl_coef != 0.0 || f.coin(0.7));
    data.weights = data.weights.filter(|_| f.coin(0.4));
    data.entropy = data.entropy.filter(|_| own.entropy_coef != 0.0 || f.coin(0.7));
    data.old_values = data.old_values.filter(|_| own.value_clip_range.is_some() || f.coin(0.7));
    data.values = data.values.filter(|_| f.coin(0.7));
    let data = data.for_options(&own);
    if own.advantages_per_row || own.weights_per_row {
        f.needed_at.push(options as u64);
    }
    let given = data.inputs();
    let stats = f.out_struct::<PpoStats>();
    let (loss, grad_logp) = (f.some_out(PPOK_F32, 1), f.some_out(PPOK_F32, n));
    let grad_values = given.values.and_then(|_| f.some_out(PPOK_F32, n));
    let grad_entropy = given.entropy.and_then(|_| f.some_out(PPOK_F32, n));
    let args = ppok_ppo_loss_args {
        struct_size: 0,
        batch,
        seq_len,
        logp: f.put(given.logp),
        old_logp: f.put(given.old_logp),
        advantages: f.put(given.advantages),
        values: f.put_some(given.values),
        old_values: f.put_some(given.old_values),
        returns: f.put_some(given.returns),
        entropy: f.put_some(given.entropy),
        ref_logp: f.put_some(given.ref_logp),
        rollout_logp: f.put_some(given.rollout_logp),
        weights: f.put_some(given.weights),
        mask: f.put_some(given.mask),
        offsets: f.put_offsets(given.offsets),
        options,
        stats: at(stats),
        loss: at(loss),
        grad_logp: at(grad_logp),
        grad_values: at(grad_values),
        grad_entropy: at(grad_entropy),
    };
    let wide_data = data.map(f64::from);
    let want = ppo_loss::reference::ppo_loss(&wide_data.inputs(), batch, seq_len, &own);
    let expected = match &want {
        Err(ppo_kernels::Error::Mask { .. }) => PPOK_STATUS_MASK,
        _ => expected,
    };
    f.call("ppo_loss", ppok_ppo_loss_cpu, 2, args, expected, |_, what| {
        let want = want.unwrap();
        let weights = ppo_loss::reference::weights(given.mask, batch, seq_len, given.offsets, &own);
        let weights = weights.unwrap().iter().sum();
        ppo_loss_cases::assert_stats_close(what, &stats.read()[0], &want.stats, weights);
        if let Some(loss) = loss {
            let Tolerance { rel, abs } = tolerance::PPO_LOSS.forward;
            let within = Tolerance { rel, abs: abs * weights.max(1.0) };
            close(what, "loss", loss, &[want.stats.loss], within);
        }
        // Where a ratio is of a row, terms of the order of a token's weight may cancel.
        let term = match own.ratio {
            RatioLevel::Token => 0.0,
            _ => 0.1 * weights / n.max(1) as f64,
        };
        for (grad, want, term) in [
            (grad_logp, want.grad_logp, term),
            (grad_values, want.grad_values, 0.0),
            (grad_entropy, want.grad_entropy, 0.0),
        ] {
            let Some(grad) = grad else { continue };
            let (mut grad, mut want) = (grad.read(), want);
            grad.push(term as f32);
            want.push(term);
            ppo_loss_cases::assert_close_scaled(what, &grad, &want);
        }
    });
}

fn ppo_loss_scale(f: &mut Fuzz) {
    let shape = f.shape();
    let tokens = shape[0] * shape[1];
    let upstream = f.one(&[1.0, -0.37, 3.0, f32::INFINITY]);
    let mut pairs = [(); 3].map(|()| (null(), null_mut(), Vec::new()));
    for (i, (stored, grad, want)) in pairs.iter_mut().enumerate() {
        // One at least.
        if i > 0 && f.coin(0.4) {
            continue;
        }
        let values = f.numbers(tokens, 0.0, 1.0);
        *want = values.iter().map(|&g| if g == 0.0 { 0.0 } else { g * upstream }).collect();
        if f.coin(0.4) {
            *grad = f.add(bytemuck::cast_slice(&values).to_vec(), 4, true) as *mut f32;
            *stored = grad.cast_const();
        } else {
            (*stored, *grad) = (f.put(&values), at(Some(f.out(PPOK_F32, tokens))));
        }
    }
    let [logp, values, entropy] = &pairs;
    f.options = None;
    let args = ppok_ppo_loss_scale_args {
        struct_size: 0,
        tokens,
        upstream: f.put(&[upstream]),
        stored_logp: logp.0,
        stored_values: values.0,
        stored_entropy: entropy.0,
        grad_logp: logp.1,
        grad_values: values.1,
        grad_entropy: entropy.1,
    };
    f.call("ppo_loss_scale", ppok_ppo_loss_scale_cpu, 1, args, PPOK_STATUS_OK, |_, what| {
        for (_, grad, want) in pairs.iter().filter(|(stored, ..)| !stored.is_null()) {
            let grad = Out { at: *grad as usize, len: tokens, kind: PPOK_F32 };
            let exactly = Tolerance { rel: 0.0, abs: 0.0 };
            close(what, "a gradient", grad, &wide(want), exactly);
        }
    });
}

fn logits_ppo_loss(f: &mut Fuzz) {
    match f.one(&[PPOK_F32, PPOK_F16, PPOK_BF16]) {
        PPOK_F16 => logits_ppo_loss_of::<f16>(f, PPOK_F16),
        PPOK_BF16 => logits_ppo_loss_of::<bf16>(f, PPOK_BF16),
        _ => logits_ppo_loss_of::<f32>(f, PPOK_F32),
    }
}

fn logits_ppo_loss_of<T: Logit>(f: &mut Fuzz, kind: i32) {
    let shape = [f.rng.random_range(1..=4), f.rng.random_range(1..=9)];
    let vocab = match f.rng.random_range(0..50) {
        0 => f.rng.random_range(33_000..70_000),
        _ => f.rng.random_range(1..=200),
    };
    let number = f.rng.random_range(0..60);
    let mut case = logits_loss_cases::Case::<T>::new(&mut f.rng, shape, vocab, number);
    let ([batch, seq_len], n) = (case.shape, case.targets.len());
    let temperature = case.logprob_options.temperature;
    case.logprob_options = LogprobOptions::default();
    let logprob_options = f.put_options(ppok_logprob_options_init, (1..=1, 1), |_, c| {
        case.logprob_options.temperature = temperature;
        c.temperature = temperature;
    });
    let own = std::mem::take(&mut case.options);
    let options = f.put_options(ppok_ppo_loss_options_init, (3..=10, 8), |_, c| {
        let struct_size = c.struct_size;
        *c = ppok_ppo_loss_options { struct_size, ..ppo_loss_cases::c_options(&own) };
        case.options = own;
    });
    if options.is_null() {
        // By default all are of tokens.
        case.advantages.resize(n, 0.5);
        case.weights.iter_mut().for_each(|weights| weights.resize(n, 1.0));
    } else if own.advantages_per_row || own.weights_per_row {
        f.needed_at.push(options as u64);
    }
    let mut expected = PPOK_STATUS_OK;
    if f.coin(0.03) {
        let kept = (0..n).find(|&t| case.mask.as_ref().is_none_or(|mask| mask[t] != 0));
        case.targets[kept.expect("one is")] = vocab as i64;
        expected = PPOK_STATUS_TARGET;
    }
    let (logp, stats) = (f.out(PPOK_F32, n), f.out_struct::<PpoStats>());
    let (entropy, grad) = (f.out(PPOK_F32, n), f.out(kind, n * vocab));
    let loss = f.some_out(PPOK_F32, 1);
    let args = ppok_logits_ppo_loss_args {
        struct_size: 0,
        batch,
        seq_len,
        vocab,
        logits_type: kind,
        targets_type: PPOK_I64,
        logits: f.put(&case.logits).cast(),
        targets: f.put(&case.targets).cast(),
        old_logp: f.put(&case.old_logp),
        advantages: f.put(&case.advantages),
        ref_logp: f.put_some(case.ref_logp.as_deref()),
        rollout_logp: f.put_some(case.rollout_logp.as_deref()),
        weights: f.put_some(case.weights.as_deref()),
        mask: f.put_some(case.mask.as_deref()),
        offsets: f.put_offsets(case.offsets.as_deref()),
        logprob_options,
        options,
        logp: at(logp),
        stats: at(stats),
        grad_logits: at(grad),
        entropy: at(entropy),
        loss: at(loss),
    };
    let function = ppok_logits_ppo_loss_cpu;
    f.call("logits_ppo_loss", function, 3, args, expected, |_, what| {
        let found = logits_loss_cases::Found {
            logp: logp.read(),
            entropy: entropy.read(),
            stats: stats.read::<PpoStats>()[0],
            grad_logits: grad.wide().iter().map(|&g| g as f32).collect(),
        };
        case.check(what, &found);
    });
}

fn preference_loss(f: &mut Fuzz) {
    let [rows, mut seq_len] = f.shape();
    let loss = f.one(&PreferenceLoss::ALL);
    let mut own = PreferenceOptions::default();
    let options = f.put_options(ppok_preference_options_init, (1..=5, 2), |f, c| {
        let plain = preference_cases::plain(loss);
        // Powers of two, so that both sides see the same h at a kink.
        own = PreferenceOptions { beta: f.one(&[0.125, 0.5]), ..plain };
        // Its default multiplies the rounding of h by 20.
        own.discopop_tau = 0.5;
        own.average_log_prob = f.coin(0.3);
        own.denominator = f.coin(0.3).then_some(7.5);
        if preference_cases::takes_margin(loss) || loss.sorts() {
            own.label_smoothing = f.one(&[0.0, 0.25]);
            own.gamma = f.one(&[0.0, 0.5]);
        }
        if matches!(loss, PreferenceLoss::Sigmoid | PreferenceLoss::ExoPair | PreferenceLoss::Ipo)
            && seq_len < 50
        {
            own.f_divergence = f.one(&[
                FDivergence::ReverseKl,
                FDivergence::ForwardKl,
                FDivergence::JensenShannon,
                FDivergence::Alpha(0.75),
            ]);
        }
        if loss != PreferenceLoss::Kto {
            own.ld_alpha = f.coin(0.3).then_some(0.25);
            own.sft_coef = f.one(&[0.0, 0.5]);
            own.sft_denominator = f.coin(0.3).then_some(11.0);
        } else {
            own.desirable_weight = f.one(&[1.0, 1.5]);
        }
        *c = ppok_preference_options {
            struct_size: c.struct_size,
            ..preference_cases::c_options(&own)
        };
    });
    // Null options are those of the default loss.
    let loss = own.loss;
    let paired = loss != PreferenceLoss::Kto;
    let odd = paired && rows > 0 && f.coin(0.02);
    let rows = match (paired, odd) {
        (true, true) => rows - rows % 2 + 1,
        (true, false) => rows.next_multiple_of(2),
        (false, _) => rows,
    };
    let units = if paired { rows / 2 } else { rows };
    let n = rows * seq_len;
    let logp = f.numbers(n, -2.0, 1.5);
    let noise = f.numbers(n, 0.0, 0.8);
    let reference: Vec<f32> = logp.iter().zip(noise).map(|(x, noise)| x + noise).collect();
    let (sums, mask) = (f.numbers(rows, -9.0, 4.0), f.mask([rows, seq_len]));
    let has_reference = !loss.is_reference_free();
    let of_tokens = has_reference && f.coin(0.5);
    let of_sums = has_reference && !of_tokens && f.coin(0.5);
    let weights = (!loss.sorts() && f.coin(0.5))
        .then(|| (0..units).map(|_| f.one(&[1.0, 0.5, 2.0, 0.0])).collect::<Vec<_>>());
    let margin =
        (preference_cases::takes_margin(loss) && f.coin(0.5)).then(|| f.numbers(units, 0.0, 0.5));
    let mut labels: Option<Vec<u8>> =
        (!paired).then(|| (0..rows).map(|_| u8::from(f.coin(0.5))).collect());
    let mut lengths: Option<Vec<i64>> =
        f.coin(0.2).then(|| (0..rows).map(|_| f.rng.random_range(0..9)).collect());
    let mut wrong = false;
    if rows > 0 && f.coin(0.03) {
        wrong = true;
        match &mut labels {
            Some(labels) => labels[rows / 2] = 2,
            None => lengths = Some(vec![-1; rows]),
        }
    }
    let mut data = preference_cases::Data {
        rows,
        seq_len,
        logp,
        ref_logp: of_tokens.then_some(reference),
        ref_sums: of_sums.then_some(sums),
        mask,
        lengths,
        weights,
        margin,
        labels,
        kl: (!paired && f.coin(0.5)).then(|| vec![0.5]),
        offsets: None,
    };
    // Divergences of long rows are exponentials of large numbers.
    if own.f_divergence == FDivergence::ReverseKl {
        let (offsets, of_offsets) = f.offsets(rows, &mut seq_len);
        (data.seq_len, data.offsets) = (seq_len, offsets);
        wrong |= of_offsets != PPOK_STATUS_OK;
    }
    if !odd && data.offsets.is_none() && n > 0 && units > 0 {
        data = preference_cases::with_nan_where_nothing_counts(&data);
    }
    let given = data.inputs();
    let stats = f.out_struct::<PreferenceStats>();
    let (loss, losses) = (f.some_out(PPOK_F32, 1), f.some_out(PPOK_F32, units));
    let (rewards, grad_logp) = (f.some_out(PPOK_F32, rows), f.some_out(PPOK_F32, n));
    let args = ppok_preference_loss_args {
        struct_size: 0,
        rows,
        seq_len,
        logp: f.put(given.logp),
        ref_logp: f.put_some(given.ref_logp),
        ref_sums: f.put_some(given.ref_sums),
        mask: f.put_some(given.mask),
        lengths: f.put_some(given.lengths),
        weights: f.put_some(given.weights),
        margin: f.put_some(given.margin),
        labels: f.put_some(given.labels),
        kl: f.put_some(given.kl),
        offsets: f.put_offsets(given.offsets),
        options,
        stats: at(stats),
        loss: at(loss),
        losses: at(losses),
        rewards: at(rewards),
        grad_logp: at(grad_logp),
    };
    let wide_data = data.map(f64::from);
    let want = preference::reference::preference_loss(&wide_data.inputs(), rows, seq_len, &own);
    let expected = match &want {
        Ok(_) => PPOK_STATUS_OK,
        Err(ppo_kernels::Error::Mask { .. }) => PPOK_STATUS_MASK,
        Err(ppo_kernels::Error::Value { .. }) if wrong => PPOK_STATUS_OPTION,
        Err(ppo_kernels::Error::Shape { .. }) if odd => PPOK_STATUS_SHAPE,
        Err(error) => panic!("{}: {error}", f.what),
    };
    f.call("preference_loss", ppok_preference_loss_cpu, 2, args, expected, |_, what| {
        let want = want.unwrap();
        // Exponentials of long rows may be beyond f32, in which these are found.
        let beyond = |x: &f64| x.is_finite() && x.abs() > f64::from(f32::MAX);
        if want.losses.iter().chain(&want.grad).any(beyond) {
            return;
        }
        preference_cases::assert_stats_close(what, &stats.read()[0], &want.stats);
        if let Some(loss) = loss {
            let Tolerance { rel, abs } = tolerance::PREFERENCE.forward;
            let scale = want.stats.preference_loss.abs().max(1.0);
            let abs = if scale.is_finite() { abs * scale } else { abs };
            close(what, "loss", loss, &[want.stats.loss], Tolerance { rel, abs });
        }
        for (out, want) in [(losses, want.losses), (rewards, want.rewards), (grad_logp, want.grad)]
        {
            let Some(out) = out else { continue };
            preference_cases::assert_close_scaled(what, &out.read(), &want);
        }
    });
}

fn reward_model_loss(f: &mut Fuzz) {
    let [pairs, width] = f.shape();
    let pairs = pairs * width;
    let mut own = RewardModelOptions::default();
    let options = f.put_options(ppok_reward_model_options_init, (1..=1, 0), |f, c| {
        own.center_coef = f.one(&[0.0, 0.01]);
        c.center_coef = own.center_coef;
        (c.denominator, own.denominator) = f.maybe(&[7.5]);
    });
    let rewards = f.numbers(2 * pairs, 0.5, 4.0);
    let margin = f.coin(0.5).then(|| f.numbers(pairs, 0.0, 0.5));
    let weights =
        f.coin(0.5).then(|| (0..pairs).map(|_| f.one(&[1.0, 0.5, 2.0, 0.0])).collect::<Vec<_>>());
    let stats = f.out_struct::<PreferenceStats>();
    let (loss, losses) = (f.some_out(PPOK_F32, 1), f.some_out(PPOK_F32, pairs));
    let grad_rewards = f.some_out(PPOK_F32, 2 * pairs);
    let args = ppok_reward_model_loss_args {
        struct_size: 0,
        pairs,
        rewards: f.put(&rewards),
        margin: f.put_some(margin.as_deref()),
        weights: f.put_some(weights.as_deref()),
        options,
        stats: at(stats),
        loss: at(loss),
        losses: at(losses),
        grad_rewards: at(grad_rewards),
    };
    let wide_rewards = wide(&rewards);
    let [margin, weights] = [margin, weights].map(|x| x.map(|x| wide(&x)));
    let inputs = preference::reference::RewardModelInputs {
        margin: margin.as_deref(),
        weights: weights.as_deref(),
        ..preference::reference::RewardModelInputs::new(&wide_rewards)
    };
    let want = preference::reference::reward_model_loss(&inputs, pairs, &own);
    let expected = if want.is_ok() { PPOK_STATUS_OK } else { PPOK_STATUS_MASK };
    f.call("reward_model_loss", ppok_reward_model_loss_cpu, 1, args, expected, |_, what| {
        let want = want.unwrap();
        preference_cases::assert_stats_close(what, &stats.read()[0], &want.stats);
        close(what, "loss", loss, &[want.stats.loss], tolerance::PREFERENCE.forward);
        for (out, want) in [(losses, want.losses), (grad_rewards, want.grad)] {
            let Some(out) = out else { continue };
            preference_cases::assert_close_scaled(what, &out.read(), &want);
        }
    });
}
