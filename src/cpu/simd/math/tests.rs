//! Errors in ulp against f64, special values, the same bits on every ISA.

use super::*;
use crate::cpu::isa::Isa;
use crate::cpu::simd::{Op, dispatch};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Function {
    Exp,
    Ln,
    Log1p,
    Log1pUnit,
    Sigmoid,
    Silu,
    Softplus,
    Tanh,
    Erf,
    GeluErf,
    GeluTanh,
    Relu,
    Relu2,
    NormalQuantile,
}
use Function::*;

/// All but what is compared with the general form.
const ALL: [Function; 13] = [
    Exp,
    Ln,
    Log1p,
    Sigmoid,
    Silu,
    Softplus,
    Tanh,
    Erf,
    GeluErf,
    GeluTanh,
    Relu,
    Relu2,
    NormalQuantile,
];

/// 2ⁿ for −126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two<S: Simd>(s: S, n: S::I) -> S::F {
    s.from_bits(s.shl::<23>(s.add_i(n, s.splat_i(127))))
}

/// ln(1 + x) for every x ≥ 0, the general form of [`log1p_unit`]; error ≤ 1.4 ulp. ∞ at ∞.
///
/// With 2ᵏ from the rounded 1 + x, the reduced argument is f = x·2⁻ᵏ + (2⁻ᵏ − 1): one fma, exact for k = 0, so small x keeps its bits.
#[inline(always)]
fn log1p<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let u = s.add(x, one);
    let k = binary_exponent(s, u);
    let scale = power_of_two(s, s.sub_i(s.splat_i(0), k));
    let f = s.fma(x, scale, s.sub(scale, one));
    // From 2²⁵ on 1 + x = x in f32, and 2⁻ᵏ would soon leave the range.
    let m = s.from_bits(s.sub_i(s.to_bits(u), s.shl::<23>(k)));
    let f = s.select(s.gt_i(k, s.splat_i(25)), s.sub(m, one), f);
    let r = ln_reduced(s, s.to_float(k), f);
    s.select(s.lt(x, s.splat(f32::INFINITY)), r, x)
}

struct Apply<'a>(Function, &'a mut [f32]);

impl Op for Apply<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        macro_rules! each {
            ($f:ident) => {
                for chunk in self.1.chunks_mut(S::LANES) {
                    let x = s.load_partial(chunk, 0.5);
                    s.store_partial(chunk, $f(s, x));
                }
            };
        }
        match self.0 {
            Exp => each!(exp),
            Ln => each!(ln),
            Log1p => each!(log1p),
            Log1pUnit => each!(log1p_unit),
            Sigmoid => each!(sigmoid),
            Silu => each!(silu),
            Softplus => each!(softplus),
            Tanh => each!(tanh),
            Erf => each!(erf),
            GeluErf => each!(gelu_erf),
            GeluTanh => each!(gelu_tanh),
            Relu => each!(relu),
            Relu2 => each!(relu2),
            NormalQuantile => each!(normal_quantile),
        }
    }
}

/// e^(−x²)·2/√π·Σ 2ⁿ·x^(2n+1)/(2n+1)!!: all terms of one sign, so the relative error is that of the exponential.
fn erf_f64(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
        if term.abs() < sum.abs() * 1e-18 {
            break;
        }
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

/// Newton on Φ from the f32 answer; used where Φ itself is accurate.
fn normal_quantile_f64(u: f64, start: f64) -> f64 {
    let mut z = start;
    for _ in 0..3 {
        let density = (-z * z / 2.0).exp() / (2.0 * PI).sqrt();
        z -= (0.5 * (1.0 + erf_f64(z * FRAC_1_SQRT_2)) - u) / density;
    }
    z
}

fn exact(f: Function, x: f64) -> f64 {
    let sigmoid = |x: f64| {
        if x < 0.0 {
            x.exp() / (1.0 + x.exp())
        } else {
            1.0 / (1.0 + (-x).exp())
        }
    };
    match f {
        Exp => x.exp(),
        Ln => x.ln(),
        Log1p | Log1pUnit => x.ln_1p(),
        Sigmoid => sigmoid(x),
        Silu => x * sigmoid(x),
        Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        Tanh => x.tanh(),
        Erf => erf_f64(x),
        GeluErf => 0.5 * x * (1.0 + erf_f64(x * FRAC_1_SQRT_2)),
        GeluTanh => x * sigmoid((8.0 / PI).sqrt() * (x + 0.044715 * x * x * x)),
        Relu => x.max(0.0),
        Relu2 => x.max(0.0).powi(2),
        NormalQuantile => unreachable!("tested on its own"),
    }
}

/// Where the error bound holds, as the docstrings say it.
fn in_domain(f: Function, x: f32) -> bool {
    match f {
        Log1p => x >= 0.0,
        Log1pUnit => (0.0..=1.0).contains(&x),
        Ln => x > 0.0,
        Silu => x >= -87.0,
        _ => !x.is_nan(),
    }
}

/// The bounds that the docstrings state.
fn bound(f: Function) -> f64 {
    match f {
        Exp => 0.9,
        Ln => 0.9,
        Log1p | Log1pUnit => 1.4,
        Sigmoid => 2.5,
        Silu => 3.0,
        Softplus => 2.0,
        Tanh => 1.5,
        Erf => 1.5,
        GeluErf => 1.5,
        GeluTanh => 2.0,
        Relu => 0.0,
        Relu2 => 0.5,
        NormalQuantile => 4.5,
    }
}

/// |got − want| in units of the last place of f32 at `want`. An infinity counts as 2^128, the next number.
fn error_in_ulp(got: f32, want: f64) -> f64 {
    let limit = 2f64.powi(128);
    let finite = |v: f64| v.clamp(-limit, limit);
    let exponent = want.abs().log2().floor().clamp(-126.0, 127.0);
    (finite(f64::from(got)) - finite(want)).abs() / 2f64.powf(exponent - 23.0)
}

/// The unit in which the error of `f` at `x` is stated.
fn error(f: Function, x: f32, got: f32) -> f64 {
    let want = exact(f, f64::from(x));
    if matches!(f, GeluErf | GeluTanh) {
        // |x|·2⁻²⁴, or the last place of a subnormal.
        let unit = f64::from(x.abs()) / 16_777_216.0;
        return (f64::from(got) - want).abs() / unit.max(2f64.powi(-149));
    }
    error_in_ulp(got, want)
}

/// The largest error over bit patterns `start, start + step, …`, and where it is.
fn worst(f: Function, step: u32) -> (f64, f32) {
    let mut worst = (0.0, 0.0);
    let mut bits = (0..=u32::MAX).step_by(step as usize);
    let mut inputs = Vec::with_capacity(4096);
    loop {
        inputs.clear();
        inputs.extend(bits.by_ref().take(4096).map(f32::from_bits));
        if inputs.is_empty() {
            return worst;
        }
        inputs.retain(|&x| x.is_finite() && in_domain(f, x));
        let mut outputs = inputs.clone();
        dispatch(Isa::best(), Apply(f, &mut outputs));
        for (&x, &y) in inputs.iter().zip(&outputs) {
            let e = error(f, x, y);
            if e > worst.0 || e.is_nan() {
                worst = (e, x);
            }
        }
    }
}

fn check_errors(step: u32) {
    let mut failures = Vec::new();
    for f in ALL {
        if f == NormalQuantile {
            continue;
        }
        let (e, x) = worst(f, step);
        println!("{f:?}: {e:.3} at {x:e}");
        if e.is_nan() || e > bound(f) {
            failures.push(format!("{f:?}: {e} at {x:e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn errors_stay_within_the_stated_bounds() {
    check_errors(5003); // prime, so that all low bits occur: 858 thousand points for each function
}

#[test]
#[ignore = "all 2^32 inputs of each function: an hour"]
fn errors_stay_within_the_stated_bounds_everywhere() {
    check_errors(1);
}

#[test]
fn normal_quantile_is_accurate_at_every_uniform() {
    let mut largest = 0.0f64;
    for k in (0..1u32 << 22).step_by(61).chain(0..300) {
        // The lower half, where Φ does not cancel; the upper half mirrors it.
        let u = (2 * k + 1) as f32 / 16_777_216.0;
        let z = normal_quantile1(u);
        assert_eq!(z.to_bits(), (-normal_quantile1(1.0 - u)).to_bits());
        let want = normal_quantile_f64(f64::from(u), f64::from(z));
        largest = largest.max(error_in_ulp(z, want));
    }
    println!("normal_quantile: {largest:.2} ulp");
    assert!(largest <= bound(NormalQuantile), "{largest}");
}

#[test]
fn special_values() {
    let inf = f32::INFINITY;
    let one = |f, x: f32| {
        let mut v = [x];
        dispatch(Isa::Scalar, Apply(f, &mut v));
        v[0]
    };
    for f in ALL {
        assert!(one(f, f32::NAN).is_nan(), "{f:?}");
        assert!(one(f, -f32::NAN).is_nan(), "{f:?}");
    }
    let table = [
        (Exp, inf, inf),
        (Exp, -inf, 0.0),
        (Exp, 0.0, 1.0),
        (Exp, -0.0, 1.0),
        (Exp, f32::MAX, inf),
        (Exp, 88.8, inf),
        (Exp, -104.0, 0.0),
        (Ln, inf, inf),
        (Ln, 0.0, -inf),
        (Ln, -0.0, -inf),
        (Ln, 1.0, 0.0),
        (Log1p, inf, inf),
        (Log1p, 0.0, 0.0),
        (Log1pUnit, 0.0, 0.0),
        (Sigmoid, inf, 1.0),
        (Sigmoid, -inf, 0.0),
        (Sigmoid, 0.0, 0.5),
        (Silu, inf, inf),
        (Silu, -inf, -0.0),
        (Silu, -f32::MAX, -0.0),
        (Silu, 0.0, 0.0),
        (Softplus, inf, inf),
        (Softplus, -inf, 0.0),
        (Tanh, inf, 1.0),
        (Tanh, -inf, -1.0),
        (Tanh, -0.0, -0.0),
        (Erf, inf, 1.0),
        (Erf, -inf, -1.0),
        (Erf, -0.0, -0.0),
        (GeluErf, inf, inf),
        (GeluErf, -inf, 0.0),
        (GeluTanh, inf, inf),
        (GeluTanh, -inf, -0.0),
        (GeluTanh, f32::MAX, f32::MAX),
        (GeluTanh, -f32::MAX, -0.0),
        (Relu, inf, inf),
        (Relu, -inf, 0.0),
        (Relu2, inf, inf),
        (Relu2, -inf, 0.0),
        (Relu2, 1e30, inf),
        (NormalQuantile, 0.5, 0.0),
    ];
    for (f, x, want) in table {
        let got = one(f, x);
        assert_eq!(
            got.to_bits(),
            want.to_bits(),
            "{f:?}({x}) = {got}, not {want}"
        );
    }
    assert!(one(Ln, -1.0).is_nan() && one(Ln, -inf).is_nan());
}

#[test]
fn both_forms_of_log1p_have_the_same_bits() {
    // All of [0, 1] in steps of a prime number of floats, and every float around where k changes.
    let change = 2.0 * core::f32::consts::FRAC_1_SQRT_2 - 1.0;
    let x: Vec<f32> = (0..=1f32.to_bits())
        .step_by(257)
        .chain(change.to_bits() - 1000..change.to_bits() + 1000)
        .chain([1f32.to_bits()])
        .map(f32::from_bits)
        .collect();
    for isa in Isa::available() {
        let (mut general, mut unit) = (x.clone(), x.clone());
        dispatch(isa, Apply(Log1p, &mut general));
        dispatch(isa, Apply(Log1pUnit, &mut unit));
        for ((x, general), unit) in x.iter().zip(&general).zip(&unit) {
            assert_eq!(general.to_bits(), unit.to_bits(), "{isa}: {x:e}");
        }
    }
}

#[test]
fn every_isa_gives_the_bits_of_the_scalar_path() {
    // Each sign and exponent with the extreme mantissas and a few hundred between, and an odd length, so that a partial vector occurs.
    let mut x: Vec<f32> = Vec::new();
    for high in 0..512u32 {
        let base = high << 23;
        x.extend([0, 1, 2, 0x3f_ffff, 0x40_0000, 0x7f_ffff].map(|m| f32::from_bits(base | m)));
        x.extend(
            (0..1u32 << 23)
                .step_by(41_011)
                .map(|m| f32::from_bits(base | m)),
        );
    }
    x.truncate(x.len() - 1 + x.len() % 2);
    let canonical = |v: &f32| {
        if v.is_nan() {
            f32::NAN.to_bits()
        } else {
            v.to_bits()
        }
    };
    for f in ALL {
        let mut want = x.clone();
        dispatch(Isa::Scalar, Apply(f, &mut want));
        for isa in Isa::available() {
            let mut got = x.clone();
            dispatch(isa, Apply(f, &mut got));
            for ((x, got), want) in x.iter().zip(&got).zip(&want) {
                assert_eq!(canonical(got), canonical(want), "{isa}: {f:?}({x:e})");
            }
        }
    }
}

#[test]
fn single_values_have_the_bits_of_the_vectors() {
    for x in [-3.7f32, -0.0, 0.4, 0.9, 17.0, f32::INFINITY] {
        let functions = [
            (exp1 as fn(f32) -> f32, Exp),
            (ln1, Ln),
            (sigmoid1, Sigmoid),
            (softplus1, Softplus),
            (tanh1, Tanh),
            (normal_quantile1, NormalQuantile),
        ];
        for (single, f) in functions {
            let mut v = [x];
            dispatch(Isa::best(), Apply(f, &mut v));
            assert!(single(x).to_bits() == v[0].to_bits() || single(x).is_nan() && v[0].is_nan());
        }
    }
}

/// The contract of the reductions, word for word.
fn butterfly(x: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 32];
    for (i, &v) in x.iter().enumerate() {
        lanes[i % 32] = f(v, lanes[i % 32]);
    }
    for off in [16, 8, 4, 2, 1] {
        let before = lanes;
        for l in 0..32 {
            lanes[l] = f(before[l], before[l ^ off]);
        }
    }
    lanes[0]
}

struct Reductions<'a>(&'a [f32]);

impl Op for Reductions<'_> {
    type Output = [f32; 3];
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [f32; 3] {
        [sum32(s, self.0), max32(s, self.0), dot32(s, self.0, self.0)]
    }
}

#[test]
fn reductions_follow_the_contract_on_every_isa() {
    let numbers: Vec<f32> = (0..300u32)
        .map(|i| {
            ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
                * (i as f32).exp2().min(1e9)
        })
        .collect();
    for n in [
        0, 1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300,
    ] {
        let x = &numbers[..n];
        let want = [
            butterfly(x, 0.0, |a, b| a + b),
            butterfly(x, f32::NEG_INFINITY, |a, b| if a > b { a } else { b }),
        ];
        let mut lanes = [0f32; 32];
        for (i, &v) in x.iter().enumerate() {
            lanes[i % 32] = v.mul_add(v, lanes[i % 32]);
        }
        let dot = butterfly(&lanes, 0.0, |a, b| a + b);
        for isa in Isa::available() {
            let got = dispatch(isa, Reductions(x));
            assert_eq!(
                got.map(f32::to_bits),
                [want[0], want[1], dot].map(f32::to_bits),
                "{isa} n {n}"
            );
        }
    }
    for isa in Isa::available() {
        // Sums start at +0, and a maximum passes over NaN.
        let zeros = dispatch(isa, Reductions(&[-0.0; 40]));
        assert_eq!(zeros[0].to_bits(), 0);
        let x = [f32::NAN, 3.0, f32::NAN, -1.0];
        assert_eq!(dispatch(isa, Reductions(&x))[1], 3.0);
        assert!(dispatch(isa, Reductions(&x))[0].is_nan());
    }
}

/// Pins the bits of every function, so that `tests/cuda_numerics.rs` can hold a GPU to them: FNV-1a over the values of a sample, every NaN as 7fc00000.
#[test]
fn bits_are_those_of_the_file() {
    let mut state = 20u64;
    let sample: Vec<f32> = (0..3 << 16)
        .map(|i| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15); // SplitMix64
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let bits = ((z ^ (z >> 31)) >> 32) as u32;
            match i % 3 {
                0 => f32::from_bits(bits),
                1 => ((bits >> 8) as f32 / 16_777_216.0 - 0.5) * 240.0,
                _ => (bits >> 8) as f32 / 16_777_216.0,
            }
        })
        .collect();
    let mut found = String::new();
    for f in ALL {
        let mut x = sample.clone();
        if f == Log1p {
            x.iter_mut().for_each(|x| *x = x.abs());
        }
        dispatch(Isa::best(), Apply(f, &mut x));
        let hash = x
            .iter()
            .map(|x| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() })
            .flat_map(u32::to_le_bytes)
            .fold(0xcbf2_9ce4_8422_2325u64, |h, byte| {
                (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        found += &format!("{f:?} {hash:016x}\n");
    }
    let pinned: String = include_str!("bits.txt")
        .lines()
        .filter(|l| !l.starts_with('#'))
        .flat_map(|l| [l, "\n"])
        .collect();
    assert_eq!(found, pinned, "found:\n{found}");
}
