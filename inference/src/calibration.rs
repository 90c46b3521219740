//! Leading some text through a model, layer by layer, to see what its matrices are multiplied with: so that rounding their weights costs
//! less.
//!
//! Hidden states of all the text are kept, and the second moments of one layer at a time.

use crate::engine::{Engine, ForwardError, Input, Piece, Want};
use crate::kernels::Compensation;
use crate::moments::{LayerCompensation, LayerMoments, Moments};

/// Tokens of a window of text, at most.
pub const WINDOW: usize = 512;

/// Leads some text through a model, one layer at a time: memory is for the hidden states of all of it.
#[derive(Debug)]
pub struct Calibration<'a> {
    engine: &'a mut Engine,
    windows: Vec<Vec<u32>>,
    /// Of each window, (tokens, hidden_size); none before the first layer.
    states: Vec<Vec<f32>>,
    next: u32,
}

/// Why a text could not be led through a model.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The model could not take it in.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// There is no text.
    #[error("there is nothing to calibrate with: the text has no tokens")]
    Empty,
    /// The caller broke off.
    #[error("interrupted")]
    Interrupted,
}

impl<'a> Calibration<'a> {
    /// Prepares for documents, each as tokens. `engine` holds the model whose weights will be rounded.
    pub fn new(engine: &'a mut Engine, documents: &[Vec<u32>]) -> Result<Self, CalibrationError> {
        let window = WINDOW.min(engine.context());
        let windows: Vec<_> = documents.iter().flat_map(|document| document.chunks(window).map(<[u32]>::to_vec)).collect();
        if windows.is_empty() {
            return Err(CalibrationError::Empty);
        }
        let states = vec![Vec::new(); windows.len()];
        Ok(Self { engine, windows, states, next: 0 })
    }

    /// Leads the text through the next layer; `goes_on` is asked behind each window.
    pub(crate) fn next_layer(&mut self, goes_on: impl Fn() -> bool) -> Result<LayerCompensation, CalibrationError> {
        let Self { engine, windows, states, next } = self;
        let decoder = engine.model().decoder();
        let (hidden, heads) = (decoder.hidden_size as usize, decoder.attention());
        let (mixed, width) = ((heads.heads * heads.head_dim) as usize, engine.model().expert_width());
        let experts = decoder.experts() as usize;
        engine.moments = Some(LayerMoments::new(experts, [hidden, mixed, width]));
        let rows_max = engine.rows_max();
        for (tokens, state) in windows.iter().zip(states) {
            let mut session = engine.session();
            let mut out = Vec::with_capacity(tokens.len() * hidden);
            for first in (0..tokens.len()).step_by(rows_max) {
                let last = (first + rows_max).min(tokens.len());
                let input =
                    if *next == 0 { Input::Tokens(&tokens[first..last]) } else { Input::Rows(&state[first * hidden..last * hidden]) };
                let piece = Piece { session: &mut session, input, positions: None, overlays: &[] };
                engine.pass(&mut [piece], *next..*next + 1, Want::Rows)?;
                for row in 0..last - first {
                    let start = out.len();
                    out.resize(start + hidden, 0.0);
                    engine.row(row, &mut out[start..]);
                }
            }
            *state = out;
            if !goes_on() {
                return Err(CalibrationError::Interrupted);
            }
        }
        *next += 1;
        Ok(engine.moments.take().expect("nobody else takes it").into())
    }

    /// For the matrix that makes logits, once all layers are done.
    pub(crate) fn head(&self) -> Option<Compensation> {
        let hidden = self.engine.model().decoder().hidden_size as usize;
        let mut moments = Moments::new(hidden);
        for state in &self.states {
            moments.add(&self.engine.model().normed(state), false);
        }
        moments.compensation()
    }
}
