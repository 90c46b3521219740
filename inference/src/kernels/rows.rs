//! Vectors of many tokens, panel by panel: 16 numbers of the first token, 16 of the second, …, then the next 16 of each.

use protocol::precision::{GROUP_COLUMNS, PANEL_ROWS};

use super::math::per_instruction_set;

/// Vectors of some tokens, panel by panel: (panels, tokens, 16). Numbers beyond the width are 0.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    data: Vec<f32>,
    tokens: usize,
    width: usize,
}

impl Rows {
    /// Room for `tokens` vectors of `width` numbers.
    pub(crate) fn with_capacity(tokens: usize, width: usize) -> Self {
        Self { data: vec![0.0; tokens * width.next_multiple_of(PANEL_ROWS)], tokens: 0, width }
    }

    /// Bytes that this room takes.
    pub(crate) fn bytes(tokens: usize, width: usize) -> u64 {
        (tokens * width.next_multiple_of(PANEL_ROWS) * 4) as u64
    }

    /// Now holds `tokens` vectors; what they are is undefined until written.
    pub(crate) fn resize(&mut self, tokens: usize) {
        self.tokens = tokens;
        assert!(self.panels() * self.panel_length() <= self.data.len(), "no more tokens than there is room for");
    }

    /// The same for vectors of another width.
    pub(crate) fn reshape(&mut self, tokens: usize, width: usize) {
        self.width = width;
        self.resize(tokens);
    }

    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers of a vector.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn panels(&self) -> usize {
        self.width.div_ceil(PANEL_ROWS)
    }

    /// Numbers of one panel.
    pub(crate) fn panel_length(&self) -> usize {
        self.tokens * PANEL_ROWS
    }

    pub(crate) fn data(&self) -> &[f32] {
        &self.data[..self.panels() * self.panel_length()]
    }

    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        let length = self.panels() * self.panel_length();
        &mut self.data[..length]
    }

    /// Copies a token's vector out, or its part from panel `first` on.
    pub(crate) fn copy_token(&self, token: usize, first: usize, out: &mut [f32]) {
        let panel = self.panel_length();
        let (whole, rest) = out.as_chunks_mut::<PANEL_ROWS>();
        let from = |i: usize| &self.data[(first + i) * panel + token * PANEL_ROWS..];
        whole.iter_mut().enumerate().for_each(|(i, out)| *out = *from(i).first_chunk().expect("a panel has 16 rows"));
        if !rest.is_empty() {
            rest.copy_from_slice(&from(whole.len())[..rest.len()]);
        }
    }

    /// Copies the vectors of tokens `token` and on, or their parts from panel `first` on, to the first `width` numbers of rows of `out`,
    /// `stride` numbers each. Goes panel by panel, since that is how they lie.
    pub(crate) fn copy_tokens(&self, token: usize, first: usize, width: usize, out: &mut [f32], stride: usize) {
        let panel = self.panel_length();
        copy_panels(&self.data[first * panel + token * PANEL_ROWS..], panel, width, out, stride);
    }

    /// Copies a token's vector in.
    pub(crate) fn set_token(&mut self, token: usize, values: &[f32]) {
        let panel = self.panel_length();
        for (i, values) in values.chunks(PANEL_ROWS).enumerate() {
            let place = &mut self.data[i * panel + token * PANEL_ROWS..][..PANEL_ROWS];
            place[..values.len()].copy_from_slice(values);
            place[values.len()..].fill(0.0);
        }
    }

    /// Adds to the vector of a token.
    pub(crate) fn add_to_token(&mut self, token: usize, values: &[f32]) {
        let panel = self.panel_length();
        for (i, values) in values.chunks(PANEL_ROWS).enumerate() {
            let place = &mut self.data[i * panel + token * PANEL_ROWS..];
            place.iter_mut().zip(values).for_each(|(place, value)| *place += value);
        }
    }
}

per_instruction_set! {
    /// Copies parts of panels, `panel` numbers apart, to the first `width` numbers of rows of `out`, `stride` numbers each.
    fn copy_panels(data: &[f32], panel: usize, width: usize, out: &mut [f32], stride: usize) -> (), copy_panels_body
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
fn copy_panels_body(data: &[f32], panel: usize, width: usize, out: &mut [f32], stride: usize) {
    let whole = width / PANEL_ROWS * PANEL_ROWS;
    let parts = |at: usize| data[at / PANEL_ROWS * panel..].as_chunks::<PANEL_ROWS>().0;
    for at in (0..whole).step_by(PANEL_ROWS) {
        for (out, from) in out.chunks_mut(stride).zip(parts(at)) {
            let out: &mut [f32; PANEL_ROWS] = out[at..].first_chunk_mut().expect("a row has all of its panels");
            *out = *from;
        }
    }
    if whole < width {
        out.chunks_mut(stride).zip(parts(whole)).for_each(|(out, from)| out[whole..width].copy_from_slice(&from[..width - whole]));
    }
}

/// A token's vector, panel by panel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vector<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> Vector<'a> {
    /// The vector of `token` in `data`, which holds panels of `tokens` tokens, from panel `first` on.
    pub(crate) fn of(data: &'a [f32], tokens: usize, first: usize, token: usize) -> Self {
        Self { data: &data[(first * tokens + token) * PANEL_ROWS..], stride: tokens * PANEL_ROWS }
    }

    /// A vector that stands alone.
    pub(crate) fn alone(data: &'a [f32]) -> Self {
        Self { data, stride: PANEL_ROWS }
    }

    /// Whether its numbers lie one behind the other.
    pub(super) fn is_alone(&self) -> bool {
        self.stride == PANEL_ROWS
    }

    /// Its numbers 32 × `group` and on; those beyond its width are zeros.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "must take on the instruction set of its caller")]
    pub(super) fn group_into(&self, group: usize, out: &mut [f32; GROUP_COLUMNS]) {
        for (half, out) in out.as_chunks_mut::<PANEL_ROWS>().0.iter_mut().enumerate() {
            let rest = self.data.get((2 * group + half) * self.stride..).unwrap_or_default();
            if let Some(whole) = rest.first_chunk() {
                *out = *whole;
            } else {
                out[..rest.len()].copy_from_slice(rest);
                out[rest.len()..].fill(0.0);
            }
        }
    }

    pub(crate) fn copy_to(self, out: &mut [f32]) {
        for (i, out) in out.chunks_mut(PANEL_ROWS).enumerate() {
            out.copy_from_slice(&self.data[i * self.stride..][..out.len()]);
        }
    }
}
