//! Random numbers that are the same from the same seed, for made-up routing and for choices in measurements.

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Where a sequence begins.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// A number below `limit`, which is at least 1.
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.bits()) * limit as u128) >> 64) as usize
    }

    /// In 0..1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// An index, by weights summed up.
    pub fn by_weight(&mut self, sums: &[f64]) -> usize {
        let drawn = self.unit() * sums[sums.len() - 1];
        sums.partition_point(|sum| *sum <= drawn).min(sums.len() - 1)
    }

    /// Brings `count` of the items to the front, each choice and order alike.
    pub fn shuffle_first<T>(&mut self, items: &mut [T], count: usize) {
        for index in 0..count.min(items.len()) {
            items.swap(index, index + self.below(items.len() - index));
        }
    }

    /// Puts the items into an order, each alike.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        self.shuffle_first(items, items.len());
    }

    /// `count` of the numbers below `limit`, ascending, each choice alike.
    pub fn sample(&mut self, limit: usize, count: usize) -> Vec<usize> {
        let mut all: Vec<_> = (0..limit).collect();
        self.shuffle_first(&mut all, count);
        all.truncate(count);
        all.sort_unstable();
        all
    }
}
