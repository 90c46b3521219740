//! Rotary position embedding (Su et al. 2021), and Qwen3-Omni's interleaved mRoPE over time, height and width.
//!
//! For text all three positions are equal, and mRoPE is plain RoPE bit for bit.

use protocol::decoder::{self, Gqa};

/// Where a token stands; text moves along all three axes at once. Times of videos are fractions.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Position {
    /// When.
    pub time: f32,
    /// How far down.
    pub height: f32,
    /// How far to the right.
    pub width: f32,
}

impl Position {
    /// The n-th token of a text.
    pub fn of_text(n: usize) -> Self {
        Self::all(n as f32)
    }

    /// The same along all three axes.
    pub const fn all(at: f32) -> Self {
        Self { time: at, height: at, width: at }
    }

    /// The farthest of the three.
    pub fn farthest(self) -> f32 {
        self.time.max(self.height).max(self.width)
    }
}

#[derive(Clone, Copy, Debug)]
enum Axis {
    Time,
    Height,
    Width,
}

/// The frequencies of a model, each with the axis it measures.
#[derive(Debug)]
pub(crate) struct RopeFrequencies {
    frequencies: Vec<(f32, Axis)>, // head_dim / 2
}

/// Cosine and sine of every frequency at one position.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rotation {
    pairs: Vec<(f32, f32)>, // head_dim / 2
}

impl RopeFrequencies {
    pub(crate) fn new(attention: &Gqa) -> Self {
        let base = attention.rope.base() as f32;
        let frequency = |i: u32| 1.0 / libm::powf(base, (2 * i) as f32 / attention.head_dim as f32);
        // Interleaved: starting from time, height takes 1, 4, 7 … and width 2, 5, 8 …, each below three times its share.
        let axis = |i: u32| match (attention.rope, i % 3) {
            (decoder::Rope::Interleaved { sections: [_, height, _], .. }, 1) if i < 3 * height => Axis::Height,
            (decoder::Rope::Interleaved { sections: [_, _, width], .. }, 2) if i < 3 * width => Axis::Width,
            _ => Axis::Time,
        };
        Self { frequencies: (0..attention.head_dim / 2).map(|i| (frequency(i), axis(i))).collect() }
    }

    /// Writes the rotation of `position`.
    pub(crate) fn at(&self, position: Position, rotation: &mut Rotation) {
        rotation.pairs.clear();
        rotation.pairs.extend(self.frequencies.iter().map(|&(frequency, axis)| {
            let position = match axis {
                Axis::Time => position.time,
                Axis::Height => position.height,
                Axis::Width => position.width,
            };
            // Not the platform's functions, whose last bit differs from one to the next.
            let angle = position * frequency;
            (libm::cosf(angle), libm::sinf(angle))
        }));
    }
}

impl Rotation {
    /// Turns a head's vector: element i goes with element i + head_dim / 2.
    pub(crate) fn apply(&self, head: &mut [f32]) {
        let (low, high) = head.split_at_mut(self.pairs.len());
        for ((a, b), &(cos, sin)) in low.iter_mut().zip(high).zip(&self.pairs) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::decoder::{QkNorm, QkvBias};

    fn attention(head_dim: u32, rope: decoder::Rope) -> Gqa {
        Gqa { heads: 1, kv_heads: 1, head_dim, rope, qk_norm: QkNorm::None, bias: QkvBias::None }
    }

    fn rotation(rope: &RopeFrequencies, position: Position) -> Rotation {
        let mut rotation = Rotation::default();
        rope.at(position, &mut rotation);
        rotation
    }

    #[test]
    fn for_text_mrope_is_rope_bit_for_bit() {
        let plain = RopeFrequencies::new(&attention(8, decoder::Rope::Plain { base: 1e6 }));
        let sections = RopeFrequencies::new(&attention(8, decoder::Rope::Interleaved { base: 1e6, sections: [2, 1, 1] }));
        for n in [0, 1, 7, 1000, 30_000] {
            let (a, b) = (rotation(&plain, Position::of_text(n)), rotation(&sections, Position::of_text(n)));
            assert_eq!(a.pairs, b.pairs);
        }
    }

    #[test]
    fn axes_are_interleaved_as_published() {
        // mrope_section [24, 20, 20] over 64 pairs: height 1, 4 … 58, width 2, 5 … 59, time the rest.
        let rope = RopeFrequencies::new(&attention(128, decoder::Rope::Interleaved { base: 1e6, sections: [24, 20, 20] }));
        for (i, (_, axis)) in rope.frequencies.iter().enumerate() {
            let expected = match i % 3 {
                1 if i < 60 => "Height",
                2 if i < 60 => "Width",
                _ => "Time",
            };
            assert_eq!(format!("{axis:?}"), expected, "pair {i}");
        }
        let moved = rotation(&rope, Position { time: 5.0, height: 9.0, width: 5.0 });
        let text = rotation(&rope, Position::of_text(5));
        let changed: Vec<_> = (0..64).filter(|&i| moved.pairs[i] != text.pairs[i]).collect();
        assert!(changed.iter().all(|i| i % 3 == 1 && *i < 60) && changed.len() == 20);
    }
}
