//! Every kernel that this processor has, against NumPy's vectors (bit for bit) and against the scalar kernel on random operands.

use std::collections::BTreeMap;

use proptest::prelude::*;
use protocol::expert_blob::{ExpertShape, HEADER_BYTES};
use safetensors::SafeTensors;

use super::math::{add_weighted, exp_and_sum, silu_times};
use super::*;
use crate::convert::convert_expert;
use crate::pool::Pool;

/// The tensors of a file in `tests/vectors`: see its script there.
pub(crate) struct Vectors(BTreeMap<String, (Vec<usize>, Vec<u8>)>);

impl Vectors {
    fn read() -> Self {
        Self::of("expert_function")
    }

    pub(crate) fn of(name: &str) -> Self {
        let path = format!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/{}.safetensors"), name);
        let bytes = std::fs::read(path).expect("the vectors are there");
        let file = SafeTensors::deserialize(&bytes).expect("valid tensors");
        Self(file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect())
    }

    pub(crate) fn bytes(&self, name: &str) -> &[u8] {
        &self.0.get(name).unwrap_or_else(|| panic!("vector {name}")).1
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub(crate) fn sides(&self, name: &str) -> (usize, usize) {
        match self.0[name].0[..] {
            [rows, columns] => (rows, columns),
            _ => panic!("{name} is a matrix"),
        }
    }

    fn cases(&self) -> Vec<String> {
        self.0.keys().filter_map(|name| Some(name.strip_suffix(".x_q")?.to_owned())).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Multiplies (rows of x) by a matrix with one set of kernels, `tile_rows` rows at a time; returns (rows, matrix rows).
fn product(kernels: &Kernels, w: Matrix<'_>, x: &[f32], tile_rows: usize) -> Vec<f32> {
    let rows = x.len() / w.columns;
    let mut operand = Operand::with_capacity(rows, w.columns, w.forms());
    let tiles: Vec<_> = (0..rows).step_by(tile_rows).map(|first| Tile { first, rows: tile_rows.min(rows - first) }).collect();
    operand.fill(&mut Pool::new(1), w.columns, w.forms(), &tiles, |row| Vector::alone(&x[row * w.columns..][..w.columns]));
    let mut out = Rows::with_capacity(rows, w.rows);
    out.resize(rows);
    project(&mut Pool::new(1), kernels, &[w], &operand, &tiles, &mut out);
    let mut by_row = vec![0.0; rows * w.rows];
    by_row.chunks_exact_mut(w.rows).enumerate().for_each(|(row, to)| out.copy_token(row, 0, to));
    by_row
}

#[test]
fn packing_is_that_of_the_vectors() {
    let vectors = Vectors::read();
    for case in vectors.cases().iter().filter(|case| *case != "any") {
        let (intermediate_size, hidden_size) = vectors.sides(&format!("{case}.gate_proj"));
        for precision in [Precision::Q4, Precision::Q8] {
            let planes = ["gate_proj", "up_proj", "down_proj"].map(|part| (vectors.bytes(&format!("{case}.{part}")), Precision::Bf16));
            let blob = convert_expert(planes, ExpertShape { precision, hidden_size, intermediate_size });
            assert!(blob == vectors.bytes(&format!("{case}.{precision}.blob")), "{case} at {precision}");
        }
    }
    let (rows, columns) = vectors.sides("pack.x");
    let x = vectors.floats("pack.x");
    for precision in [Precision::Q4, Precision::Q8] {
        let mut plane = vec![0; precision.matrix_bytes(rows, columns)];
        pack(precision, rows, columns, &mut plane, None, |row, out| out.copy_from_slice(&x[row * columns..][..columns]));
        assert!(plane == vectors.bytes(&format!("pack.{precision}.plane")), "{precision}");
    }
}

#[test]
fn every_kernel_gives_the_bits_of_the_vectors() {
    let vectors = Vectors::read();
    assert!(vectors.cases().len() >= 7);
    for case in vectors.cases() {
        let (_, hidden_size) = vectors.sides(&format!("{case}.x"));
        let x = vectors.floats(&format!("{case}.x"));
        for precision in [Precision::Q4, Precision::Q8] {
            let blob = vectors.bytes(&format!("{case}.{precision}.blob"));
            let shape = ExpertShape::of_blob(blob).expect("a blob");
            assert_eq!((shape.precision, shape.hidden_size, HEADER_BYTES), (precision, hidden_size, 64));
            let [gate, up, down] = shape.planes();
            for kernels in Kernels::available() {
                for tile_rows in 1..=13 {
                    let times = |plane: &std::ops::Range<usize>, rows, x: &[f32]| {
                        product(kernels, Matrix::new(&blob[plane.clone()], precision, rows, x.len() / 13), x, tile_rows)
                    };
                    let mut middle = times(&gate, shape.intermediate_size, &x);
                    let place = format!("{case} at {precision}, {} kernels, {tile_rows} rows at a time", kernels.name);
                    assert!(bits(&middle) == bits(&vectors.floats(&format!("{case}.{precision}.gate"))), "gate of {place}");
                    silu_times(&mut middle, &times(&up, shape.intermediate_size, &x));
                    let y = times(&down, hidden_size, &middle);
                    assert!(bits(&y) == bits(&vectors.floats(&format!("{case}.{precision}.y"))), "y of {place}");
                }
            }
        }
    }
}

#[test]
fn low_precisions_are_those_of_the_vectors() {
    let vectors = Vectors::of("low_precisions");
    for (hidden_size, intermediate_size) in [(64, 48), (33, 17), (96, 80)] {
        for precision in [Precision::Q6, Precision::Q3, Precision::Q2] {
            let case = format!("{hidden_size}x{intermediate_size}.{precision}");
            let planes = ["gate_proj", "up_proj", "down_proj"].map(|part| (vectors.bytes(&format!("{case}.{part}")), Precision::Bf16));
            let shape = ExpertShape { precision, hidden_size, intermediate_size };
            let blob = convert_expert(planes, shape);
            assert!(blob == vectors.bytes(&format!("{case}.blob")), "packing of {case}");
            assert_eq!(ExpertShape::of_blob(&blob), Ok(shape));
            let ([gate, up, down], kinds) = (shape.planes(), precision.of_planes());
            let x = vectors.floats(&format!("{case}.x"));
            for kernels in Kernels::available() {
                for tile_rows in 1..=13 {
                    let times = |plane: &std::ops::Range<usize>, precision, rows, x: &[f32]| {
                        product(kernels, Matrix::new(&blob[plane.clone()], precision, rows, x.len() / 13), x, tile_rows)
                    };
                    let place = format!("{case}, {} kernels, {tile_rows} rows at a time", kernels.name);
                    let mut middle = times(&gate, kinds[0], intermediate_size, &x);
                    assert!(bits(&middle) == bits(&vectors.floats(&format!("{case}.gate"))), "gate of {place}");
                    silu_times(&mut middle, &times(&up, kinds[1], intermediate_size, &x));
                    let y = times(&down, kinds[2], hidden_size, &middle);
                    assert!(bits(&y) == bits(&vectors.floats(&format!("{case}.y"))), "y of {place}");
                }
            }
        }
    }
}

#[test]
fn exponential_silu_and_weighted_sums_are_those_of_the_vectors() {
    let vectors = Vectors::read();
    let (x, y) = (vectors.floats("exp.x"), vectors.floats("exp.y"));
    x.iter().zip(&y).for_each(|(&x, y)| assert_eq!(math::exp(x).to_bits(), y.to_bits(), "e^{x}"));
    // Vectorised: beside a maximum of 0, which changes nothing.
    for (x, y) in x.chunks(37).zip(y.chunks(37)).filter(|(x, _)| x.iter().all(|&x| x <= 0.0)) {
        let mut x = [x, &[0.0]].concat();
        exp_and_sum(&mut x);
        assert_eq!(bits(&x[..y.len()]), bits(y));
    }
    let mut z = vectors.floats("silu.z");
    let ones = vec![1.0; z.len()];
    silu_times(&mut z, &ones);
    assert!(bits(&z) == bits(&vectors.floats("silu.y")));
    let mut sum = [0.0; 64];
    for (weight, y) in vectors.floats("layer.weights").iter().zip(vectors.floats("layer.y").chunks_exact(64)) {
        add_weighted(&mut sum, &[3, 0, 2, 1].map(|row| (row, *weight)), &[&y[48..], &y[..16], &y[32..48], &y[16..32]].concat());
    }
    assert_eq!(bits(&sum), bits(&vectors.floats("layer.z")));
}

/// The order of plain products as that module describes it, written down plainly.
fn plain_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for i in 0..a.len() {
        lanes[i % 16] += a[i] * b[i];
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

proptest! {
    #[test]
    fn plain_products_keep_the_order(columns in 1usize..100, rows in 1usize..70, tokens in 1usize..11, seed in any::<u64>()) {
        let x = numbers(tokens * columns, seed);
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            let weights = numbers(rows * columns, seed ^ 1);
            let bytes = crate::convert::convert_matrix(bytemuck::cast_slice(&weights), Precision::F32, precision, (rows, columns));
            let bytes = crate::aligned::AlignedBytes::copy_of(&bytes);
            let w = Matrix::new(&bytes, precision, rows, columns);
            let found = product(Kernels::best(), w, &x, 4);
            let mut row = vec![0.0; columns];
            for r in 0..rows {
                w.row(r, &mut row);
                for t in 0..tokens {
                    let expected = plain_dot(&row, &x[t * columns..][..columns]);
                    prop_assert_eq!(found[t * rows + r].to_bits(), expected.to_bits(), "{} row {} token {}", precision, r, t);
                }
            }
        }
    }

    #[test]
    fn kernels_agree_on_any_bytes(columns in 1usize..200, rows in 1usize..40, tokens in 1usize..=TILE_MAX, seed in any::<u64>()) {
        let x = numbers(tokens * columns, seed);
        for precision in [Precision::Q8, Precision::Q6, Precision::Q4, Precision::Q3, Precision::Q2] {
            let mut bytes: Vec<u8> = numbers(precision.matrix_bytes(rows, columns), seed ^ 2).iter().map(|x| (x * 128.0) as i32 as u8).collect();
            let (head, panels) = bytes.split_at_mut(precision.head_bytes());
            if let [exponent, zeros @ ..] = head {
                zeros.fill(0);
                *exponent = 1 + *exponent % 239;
            } else {
                for block in panels.chunks_exact_mut(precision.block_bytes().expect("packed")) {
                    // Finite scales, of any sign.
                    block[..32].as_chunks_mut::<2>().0.iter_mut().for_each(|scale| scale[1] &= 0xbb);
                }
            }
            let w = Matrix::new(&bytes, precision, rows, columns);
            let expected = bits(&product(&packed::KERNELS, w, &x, 1));
            for kernels in Kernels::available() {
                for tile_rows in [1, tokens] {
                    prop_assert!(bits(&product(kernels, w, &x, tile_rows)) == expected, "{}", kernels.name);
                }
            }
        }
    }
}
