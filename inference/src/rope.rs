//! Rotary position embedding (Su et al. 2021), and Qwen3-Omni's interleaved mRoPE over time, height and width.
//!
//! For text all three positions are equal, and mRoPE is plain RoPE bit for bit.

use protocol::ModelConfig;

/// Where a token stands; text moves along all three axes at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Position {
    pub(crate) time: u32,
    pub(crate) height: u32,
    pub(crate) width: u32,
}

impl Position {
    /// The n-th token of a text.
    pub(crate) fn of_text(n: usize) -> Self {
        let n = n as u32;
        Self { time: n, height: n, width: n }
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
pub(crate) struct Rope {
    frequencies: Vec<(f32, Axis)>, // head_dim / 2
}

/// Cosine and sine of every frequency at one position.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rotation {
    pairs: Vec<(f32, f32)>, // head_dim / 2
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let base = config.rope_theta as f32;
        let frequency = |i: u32| 1.0 / libm::powf(base, (2 * i) as f32 / config.head_dim as f32);
        // Interleaved: starting from time, height takes 1, 4, 7 … and width 2, 5, 8 …, each below three times its share.
        let axis = |i: u32| match (config.mrope_section, i % 3) {
            (Some([_, height, _]), 1) if i < 3 * height => Axis::Height,
            (Some([_, _, width]), 2) if i < 3 * width => Axis::Width,
            _ => Axis::Time,
        };
        Self { frequencies: (0..config.head_dim / 2).map(|i| (frequency(i), axis(i))).collect() }
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
            let angle = position as f32 * frequency;
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
    use crate::model::tests::tiny_config;

    fn rotation(rope: &Rope, position: Position) -> Rotation {
        let mut rotation = Rotation::default();
        rope.at(position, &mut rotation);
        rotation
    }

    #[test]
    fn for_text_mrope_is_rope_bit_for_bit() {
        let plain = Rope::new(&tiny_config());
        let sections = Rope::new(&ModelConfig { mrope_section: Some([2, 1, 1]), ..tiny_config() });
        for n in [0, 1, 7, 1000, 30_000] {
            let (a, b) = (rotation(&plain, Position::of_text(n)), rotation(&sections, Position::of_text(n)));
            assert_eq!(a.pairs, b.pairs);
        }
    }

    #[test]
    fn axes_are_interleaved_as_published() {
        // mrope_section [24, 20, 20] over 64 pairs: height 1, 4 … 58, width 2, 5 … 59, time the rest.
        let config = ModelConfig { head_dim: 128, mrope_section: Some([24, 20, 20]), ..tiny_config() };
        let rope = Rope::new(&config);
        for (i, (_, axis)) in rope.frequencies.iter().enumerate() {
            let expected = match i % 3 {
                1 if i < 60 => "Height",
                2 if i < 60 => "Width",
                _ => "Time",
            };
            assert_eq!(format!("{axis:?}"), expected, "pair {i}");
        }
        let moved = rotation(&rope, Position { time: 5, height: 9, width: 5 });
        let text = rotation(&rope, Position::of_text(5));
        let changed: Vec<_> = (0..64).filter(|&i| moved.pairs[i] != text.pairs[i]).collect();
        assert!(changed.iter().all(|i| i % 3 == 1 && *i < 60) && changed.len() == 20);
    }
}
