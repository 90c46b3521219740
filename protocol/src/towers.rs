//! What the parts beside a text decoder are made of, as data: towers that see and hear, and what speaks.
//!
//! Shapes follow Qwen3-Omni's, whose steps `docs/omni.md` defines. Members of structures never change; another kind of tower is another member
//! of [`PartConfig`](crate::manifest::PartConfig).

use serde::{Deserialize, Serialize};

use crate::decoder::{ConfigError, Decoder, Embedding, Head};
use crate::expert_blob::SIDE_MAX;
use crate::tensors::{
    Affine, AudioTensor, BlockTensor, LayerTensor, MergerTensor, Snake, SpeechTensor, TensorRole, TensorSpec, UpsampleTensor, VisionTensor,
    WaveBlockTensor, WaveTensor,
};

/// Most layers of a tower.
pub const TOWER_LAYERS_MAX: u32 = 256;
/// Colours of a picture.
pub const CHANNELS: u32 = 3;
/// Convolutions before an audio tower's layers; each halves time and frequency.
pub const CONVOLUTIONS: u32 = 3;
/// Sides of their kernels.
const KERNEL: u32 = 3;
/// Taps of a wave decoder's causal convolutions.
const TAPS: u32 = 7;
/// Residual units of a block of a wave decoder.
pub const UNITS: u32 = 3;
/// Steps that a wave decoder upsamples in, at most, and their greatest ratio.
const STEPS_MAX: usize = 8;
const RATIO_MAX: u32 = 64;
const SPEAKERS_MAX: usize = 256;
const SPEAKER_BYTES_MAX: usize = 64;

/// Patches of pictures in, rows for a decoder out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vision {
    /// Transformer blocks.
    pub layers: u32,
    /// Length of the vectors that pass from block to block.
    pub hidden_size: u32,
    /// Heads of attention.
    pub heads: u32,
    /// Length of the vectors inside a block's feed-forward half.
    pub width: u32,
    /// Side of a patch, in pixels.
    pub patch: u32,
    /// Side of the square of patches that becomes one row.
    pub merge: u32,
    /// Frames that a patch spans.
    pub frames: u32,
    /// Side of the square that the table of positions covers, in patches.
    pub side: u32,
    /// Length of the rows that come out.
    pub out: u32,
    /// Blocks whose output goes to a decoder's first layers, one to each, ascending.
    pub deepstack: Vec<u32>,
    /// Token of a place in a prompt that a picture's rows take.
    pub image_token: u32,
    /// The same of a video.
    pub video_token: u32,
    /// Token before such places.
    pub start_token: u32,
    /// Token behind them.
    pub end_token: u32,
    /// Positions that a second takes.
    pub positions_per_second: u32,
    /// Pixels of a picture, at least, after it was resized.
    pub pixels_min: u32,
    /// Pixels of a picture, at most.
    pub pixels_max: u32,
    /// Pixels of a video's frame, at least.
    pub frame_pixels_min: u32,
    /// Pixels of a video's frame, at most.
    pub frame_pixels_max: u32,
}

/// Sound in, rows for a decoder out. Sound is mono, 16,000 samples a second; its spectrum is Whisper's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Audio {
    /// Transformer layers.
    pub layers: u32,
    /// Length of the vectors that pass from layer to layer.
    pub hidden_size: u32,
    /// Heads of attention.
    pub heads: u32,
    /// Length of the vectors inside a layer's feed-forward half.
    pub width: u32,
    /// Bands of the spectrum.
    pub bands: u32,
    /// Channels of the convolutions.
    pub channels: u32,
    /// Frames of the spectrum that pass through the convolutions together; 100 a second.
    pub chunk: u32,
    /// Frames that attention looks at together; a multiple of `chunk`.
    pub window: u32,
    /// Length of the rows that come out.
    pub out: u32,
    /// Token of a place in a prompt that a sound's rows take.
    pub token: u32,
    /// Token before such places.
    pub start_token: u32,
    /// Token behind them.
    pub end_token: u32,
}

/// Text and hidden states in, the first code of each moment of speech out.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Talker {
    /// Its layers; its embeddings and its head are those of codes.
    pub decoder: Decoder,
    /// Length of the vectors inside the two projections.
    pub width: u32,
    /// Length of the thinker's vectors.
    pub thinker_hidden_size: u32,
    /// The thinker's layers before the hidden states that it takes.
    pub accept_layers: u32,
    /// Codes of a moment.
    pub groups: u32,
    /// Its special codes.
    pub codes: TalkerCodes,
    /// The thinker's tokens that it knows.
    pub tokens: TalkerTokens,
    /// Voices: name and code.
    pub speakers: Vec<(String, u32)>,
}

/// A talker's special codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TalkerCodes {
    /// Nothing is said.
    pub pad: u32,
    /// Speech begins.
    pub begin: u32,
    /// Speech ends.
    pub end: u32,
    /// No thoughts come first.
    pub no_think: u32,
    /// Thoughts begin.
    pub think_begin: u32,
    /// Thoughts end.
    pub think_end: u32,
}

/// A thinker's tokens that a talker knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TalkerTokens {
    /// A message begins.
    pub message_begin: u32,
    /// A message ends.
    pub message_end: u32,
    /// Who speaks: the system.
    pub system: u32,
    /// Who speaks: the user.
    pub user: u32,
    /// Who speaks: the model.
    pub assistant: u32,
    /// Text of speech is missing.
    pub pad: u32,
    /// Text of speech begins.
    pub begin: u32,
    /// Text of speech ends.
    pub end: u32,
}

/// The first code of a moment and a hidden state in, its other codes out.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CodePredictor {
    /// Its layers; embeddings and heads are one for each group.
    pub decoder: Decoder,
    /// Codes of a moment, the first among them.
    pub groups: u32,
}

/// Codes in, sound out: 24,000 samples a second.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CodeToWave {
    /// Transformer layers.
    pub layers: u32,
    /// Length of the vectors that pass from layer to layer.
    pub hidden_size: u32,
    /// Heads of attention.
    pub heads: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Length of the vectors inside a layer's feed-forward half.
    pub width: u32,
    /// Moments that attention looks back on, the present one among them.
    pub window: u32,
    /// The base of the frequencies of positions.
    pub rope_base: f64,
    /// Added to mean squares.
    pub eps: f64,
    /// Books of codes.
    pub books: u32,
    /// Codes of a book.
    pub codes: u32,
    /// Channels where the decoder begins; each block halves them.
    pub channels: u32,
    /// Ratios of the steps before the decoder.
    pub upsampling: Vec<u32>,
    /// Ratios of the decoder's blocks.
    pub rates: Vec<u32>,
}

fn check(field: &'static str, value: u32, least: u32, most: u32) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(ConfigError::new(field, value, format!("must be {least} to {most}"))) }
}

fn check_heads(hidden_size: u32, heads: u32) -> Result<(), ConfigError> {
    check("heads", heads, 1, 1024)?;
    if !hidden_size.is_multiple_of(heads) || !(hidden_size / heads).is_multiple_of(4) || hidden_size / heads > 1024 {
        return Err(ConfigError::new("heads", heads, "must divide hidden_size into multiples of 4, 1024 at most"));
    }
    Ok(())
}

/// Makes the list of a part's tensors.
struct Tensors(Vec<TensorSpec>);

impl Tensors {
    fn push(&mut self, role: TensorRole, shape: &[u32], packable: bool) {
        self.0.push(TensorSpec { role, shape: shape.iter().copied().map(u64::from).collect(), packable });
    }

    /// A matrix and what is added to its products.
    fn matrix(&mut self, role: impl Fn(Affine) -> TensorRole, shape: [u32; 2]) {
        self.push(role(Affine::Weight), &shape, true);
        self.push(role(Affine::Bias), &shape[..1], false);
    }

    /// A convolution that is computed as a matrix is.
    fn convolution(&mut self, role: impl Fn(Affine) -> TensorRole, shape: &[u32]) {
        self.push(role(Affine::Weight), shape, true);
        self.push(role(Affine::Bias), &shape[..1], false);
    }

    /// Another convolution, whose results are `channels`, or a norm.
    fn plain(&mut self, role: impl Fn(Affine) -> TensorRole, shape: &[u32], channels: u32) {
        self.push(role(Affine::Weight), shape, false);
        self.push(role(Affine::Bias), &[channels], false);
    }

    fn snake(&mut self, role: impl Fn(Snake) -> TensorRole, channels: u32) {
        self.push(role(Snake::Alpha), &[channels], false);
        self.push(role(Snake::Beta), &[channels], false);
    }
}

impl Vision {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check("depth", self.layers, 1, TOWER_LAYERS_MAX)?;
        check("hidden_size", self.hidden_size, 4, SIDE_MAX as u32)?;
        check_heads(self.hidden_size, self.heads)?;
        check("intermediate_size", self.width, 1, SIDE_MAX as u32)?;
        check("patch_size", self.patch, 1, 64)?;
        check("spatial_merge_size", self.merge, 1, 8)?;
        check("temporal_patch_size", self.frames, 1, 8)?;
        check("num_position_embeddings (its root)", self.side, 1, 1024)?;
        check("out_hidden_size", self.out, 1, SIDE_MAX as u32)?;
        check("hidden_size × spatial_merge_size²", self.merged(), 1, SIDE_MAX as u32)?;
        check("position_id_per_seconds", self.positions_per_second, 1, 1 << 16)?;
        check("min_pixels", self.pixels_min, 1, self.pixels_max)?;
        check("max_pixels", self.pixels_max, self.pixels_min, 1 << 28)?;
        check("min_pixels of a frame", self.frame_pixels_min, 1, self.frame_pixels_max)?;
        check("max_pixels of a frame", self.frame_pixels_max, self.frame_pixels_min, 1 << 28)?;
        let ascending = self.deepstack.is_sorted_by(|a, b| a < b);
        if !ascending || self.deepstack.len() > 64 || self.deepstack.last().is_some_and(|&last| last >= self.layers) {
            return Err(ConfigError::new("deepstack_visual_indexes", format!("{:?}", self.deepstack), "must name blocks, ascending"));
        }
        Ok(())
    }

    /// Length of merged rows.
    pub fn merged(&self) -> u32 {
        self.hidden_size.saturating_mul(self.merge * self.merge)
    }

    /// Numbers of a patch.
    pub fn patch_numbers(&self) -> u32 {
        CHANNELS * self.frames * self.patch * self.patch
    }

    /// All tensors, in the order of a manifest.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (mut tensors, hidden, merged) = (Tensors(Vec::new()), self.hidden_size, self.merged());
        let vision = TensorRole::Vision;
        tensors.convolution(|part| vision(VisionTensor::Patch(part)), &[hidden, CHANNELS, self.frames, self.patch, self.patch]);
        tensors.push(vision(VisionTensor::Positions), &[self.side * self.side, hidden], false);
        for block in 0..self.layers {
            let role = |tensor: fn(Affine) -> BlockTensor| move |part| vision(VisionTensor::Block(block, tensor(part)));
            tensors.plain(role(BlockTensor::AttentionNorm), &[hidden], hidden);
            tensors.matrix(role(BlockTensor::QueryKeyValue), [3 * hidden, hidden]);
            tensors.matrix(role(BlockTensor::Output), [hidden, hidden]);
            tensors.plain(role(BlockTensor::FeedForwardNorm), &[hidden], hidden);
            tensors.matrix(role(BlockTensor::Up), [self.width, hidden]);
            tensors.matrix(role(BlockTensor::Down), [hidden, self.width]);
        }
        let mut merger = |role: &dyn Fn(MergerTensor) -> VisionTensor, norm: u32| {
            tensors.plain(|part| vision(role(MergerTensor::Norm(part))), &[norm], norm);
            tensors.matrix(|part| vision(role(MergerTensor::Up(part))), [merged, merged]);
            tensors.matrix(|part| vision(role(MergerTensor::Down(part))), [self.out, merged]);
        };
        // The last one's norm comes before rows are merged, the others' behind that.
        merger(&VisionTensor::Merger, hidden);
        for number in 0..self.deepstack.len() as u32 {
            merger(&|tensor| VisionTensor::Deepstack(number, tensor), merged);
        }
        tensors.0
    }
}

impl Audio {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check("encoder_layers", self.layers, 1, TOWER_LAYERS_MAX)?;
        check("d_model", self.hidden_size, 4, SIDE_MAX as u32)?;
        check_heads(self.hidden_size, self.heads)?;
        check("encoder_ffn_dim", self.width, 1, SIDE_MAX as u32)?;
        check("num_mel_bins", self.bands, 8, 1024)?;
        check("downsample_hidden_size", self.channels, 1, 4096)?;
        check("downsample_hidden_size × frequencies", self.channels * self.frequencies(), 1, SIDE_MAX as u32)?;
        check("n_window × 2", self.chunk, 8, 6000)?;
        check("n_window_infer", self.window, self.chunk, 1 << 20)?;
        if !self.window.is_multiple_of(self.chunk) {
            return Err(ConfigError::new("n_window_infer", self.window, "must be a multiple of twice n_window"));
        }
        check("output_dim", self.out, 1, SIDE_MAX as u32)
    }

    /// Frequencies that the convolutions leave.
    pub fn frequencies(&self) -> u32 {
        (0..CONVOLUTIONS).fold(self.bands, |bands, _| bands.div_ceil(2))
    }

    /// All tensors, in the order of a manifest.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (mut tensors, hidden) = (Tensors(Vec::new()), self.hidden_size);
        let audio = TensorRole::Audio;
        for number in 0..CONVOLUTIONS {
            let before = if number == 0 { 1 } else { self.channels };
            let shape = [self.channels, before, KERNEL, KERNEL];
            tensors.convolution(|part| audio(AudioTensor::Convolution(number, part)), &shape);
        }
        tensors.push(audio(AudioTensor::Rows), &[hidden, self.channels * self.frequencies()], true);
        for layer in 0..self.layers {
            let role = |tensor: fn(Affine) -> BlockTensor| move |part| audio(AudioTensor::Layer(layer, tensor(part)));
            tensors.plain(role(BlockTensor::AttentionNorm), &[hidden], hidden);
            for tensor in [BlockTensor::Query, BlockTensor::Key, BlockTensor::Value, BlockTensor::Output] {
                tensors.matrix(role(tensor), [hidden, hidden]);
            }
            tensors.plain(role(BlockTensor::FeedForwardNorm), &[hidden], hidden);
            tensors.matrix(role(BlockTensor::Up), [self.width, hidden]);
            tensors.matrix(role(BlockTensor::Down), [hidden, self.width]);
        }
        tensors.plain(|part| audio(AudioTensor::FinalNorm(part)), &[hidden], hidden);
        tensors.matrix(|part| audio(AudioTensor::Up(part)), [hidden, hidden]);
        tensors.matrix(|part| audio(AudioTensor::Down(part)), [self.out, hidden]);
        tensors.0
    }
}

impl Talker {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.decoder.validate()?;
        check("intermediate_size", self.width, 1, SIDE_MAX as u32)?;
        check("thinker_hidden_size", self.thinker_hidden_size, 1, SIDE_MAX as u32)?;
        check("accept_hidden_layer", self.accept_layers, 0, crate::decoder::LAYERS_MAX)?;
        check("num_code_groups", self.groups, 2, 64)?;
        let TalkerCodes { pad, begin, end, no_think, think_begin, think_end } = self.codes;
        let codes = [pad, begin, end, no_think, think_begin, think_end].into_iter().chain(self.speakers.iter().map(|(_, code)| *code));
        if let Some(beyond) = codes.into_iter().find(|&code| code >= self.decoder.vocab_size) {
            return Err(ConfigError::new("codec ids", beyond, format!("must be below {}", self.decoder.vocab_size)));
        }
        let named = |(name, _): &(String, u32)| (1..=SPEAKER_BYTES_MAX).contains(&name.len());
        if self.speakers.is_empty() || self.speakers.len() > SPEAKERS_MAX || !self.speakers.iter().all(named) {
            return Err(ConfigError::new("speaker_id", self.speakers.len(), format!("must be 1 to {SPEAKERS_MAX} named voices")));
        }
        Ok(())
    }

    /// All tensors but the experts, in the order of a manifest.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = Tensors(self.decoder.tensors());
        let (into, out) = ([self.width, self.thinker_hidden_size], [self.decoder.hidden_size, self.width]);
        tensors.matrix(|part| TensorRole::Speech(SpeechTensor::TextUp(part)), into);
        tensors.matrix(|part| TensorRole::Speech(SpeechTensor::TextDown(part)), out);
        tensors.matrix(|part| TensorRole::Speech(SpeechTensor::HiddenUp(part)), into);
        tensors.matrix(|part| TensorRole::Speech(SpeechTensor::HiddenDown(part)), out);
        tensors.0
    }
}

impl CodePredictor {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.decoder.validate()?;
        if (self.decoder.embedding, self.decoder.head) != (Embedding::Elsewhere, Head::Elsewhere) {
            return Err(ConfigError::new("embedding", "a table", "a code predictor has one for each group"));
        }
        check("num_code_groups", self.groups, 2, 64)
    }

    /// All tensors, in the order of a manifest.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = Tensors(self.decoder.tensors());
        let shape = [self.decoder.vocab_size, self.decoder.hidden_size];
        for role in [SpeechTensor::CodeEmbedding, SpeechTensor::CodeHead] {
            (0..self.groups - 1).for_each(|group| tensors.push(TensorRole::Speech(role(group)), &shape, true));
        }
        tensors.0
    }
}

impl CodeToWave {
    /// Checks every field against its limits, so that no product of sizes overflows later.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check("num_hidden_layers", self.layers, 1, TOWER_LAYERS_MAX)?;
        check("hidden_size", self.hidden_size, 4, SIDE_MAX as u32)?;
        check_heads(self.hidden_size, self.heads)?;
        check("num_key_value_heads", self.kv_heads, 1, self.heads)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ConfigError::new("num_key_value_heads", self.kv_heads, "must divide num_attention_heads"));
        }
        check("intermediate_size", self.width, 1, SIDE_MAX as u32)?;
        check("sliding_window", self.window, 1, 1 << 20)?;
        check("num_quantizers", self.books, 1, 64)?;
        check("codebook_size", self.codes, 1, 1 << 16)?;
        check("decoder_dim", self.channels, 1, SIDE_MAX as u32)?;
        if !(self.rope_base.is_finite() && self.rope_base > 1.0) {
            return Err(ConfigError::new("rope_theta", self.rope_base, "must be a number above 1"));
        }
        if !(self.eps.is_finite() && (0.0..1.0).contains(&self.eps)) {
            return Err(ConfigError::new("rms_norm_eps", self.eps, "must be a number from 0 to 1"));
        }
        for (field, ratios) in [("upsampling_ratios", &self.upsampling), ("upsample_rates", &self.rates)] {
            if ratios.is_empty() || ratios.len() > STEPS_MAX || ratios.iter().any(|&ratio| ratio == 0 || ratio > RATIO_MAX) {
                return Err(ConfigError::new(field, format!("{ratios:?}"), format!("must be 1 to {STEPS_MAX} ratios of 1 to {RATIO_MAX}")));
            }
        }
        if !self.channels.is_multiple_of(1 << self.rates.len()) {
            return Err(ConfigError::new("decoder_dim", self.channels, "must be halved by every block"));
        }
        Ok(())
    }

    /// All tensors, in the order of a manifest.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let (mut tensors, hidden) = (Tensors(Vec::new()), self.hidden_size);
        let wave = TensorRole::Wave;
        tensors.push(wave(WaveTensor::Codes), &[self.books * self.codes, hidden], false);
        let kv = hidden / self.heads * self.kv_heads;
        for layer in 0..self.layers {
            let role = |tensor| wave(WaveTensor::Layer(layer, tensor));
            tensors.push(role(LayerTensor::MixerNorm), &[hidden], false);
            tensors.push(role(LayerTensor::Query), &[hidden, hidden], true);
            tensors.push(role(LayerTensor::Key), &[kv, hidden], true);
            tensors.push(role(LayerTensor::Value), &[kv, hidden], true);
            tensors.push(role(LayerTensor::Output), &[hidden, hidden], true);
            tensors.push(wave(WaveTensor::AttentionScale(layer)), &[hidden], false);
            tensors.push(role(LayerTensor::FeedForwardNorm), &[hidden], false);
            tensors.push(role(LayerTensor::Gate), &[self.width, hidden], true);
            tensors.push(role(LayerTensor::Up), &[self.width, hidden], true);
            tensors.push(role(LayerTensor::Down), &[hidden, self.width], true);
            tensors.push(wave(WaveTensor::FeedForwardScale(layer)), &[hidden], false);
        }
        tensors.push(wave(WaveTensor::FinalNorm), &[hidden], false);
        for (step, &ratio) in (0..).zip(&self.upsampling) {
            let role = |tensor: fn(Affine) -> UpsampleTensor| move |part| wave(WaveTensor::Upsample(step, tensor(part)));
            tensors.plain(role(UpsampleTensor::Convolution), &[hidden, hidden, ratio], hidden);
            tensors.plain(role(UpsampleTensor::Depthwise), &[hidden, 1, TAPS], hidden);
            tensors.plain(role(UpsampleTensor::Norm), &[hidden], hidden);
            tensors.matrix(role(UpsampleTensor::Up), [4 * hidden, hidden]);
            tensors.matrix(role(UpsampleTensor::Down), [hidden, 4 * hidden]);
            tensors.push(wave(WaveTensor::Upsample(step, UpsampleTensor::Scale)), &[hidden], false);
        }
        tensors.plain(|part| wave(WaveTensor::Start(part)), &[self.channels, hidden, TAPS], self.channels);
        let mut channels = self.channels;
        for (block, &rate) in (0..).zip(&self.rates) {
            let role = |tensor| wave(WaveTensor::Block(block, tensor));
            tensors.snake(|part| role(WaveBlockTensor::Snake(part)), channels);
            tensors.plain(|part| role(WaveBlockTensor::Convolution(part)), &[channels, channels / 2, 2 * rate], channels / 2);
            channels /= 2;
            for unit in 0..UNITS {
                tensors.snake(|part| role(WaveBlockTensor::UnitSnake(unit, part)), channels);
                tensors.plain(|part| role(WaveBlockTensor::UnitConvolution(unit, part)), &[channels, channels, TAPS], channels);
                tensors.snake(|part| role(WaveBlockTensor::UnitSecondSnake(unit, part)), channels);
                tensors.plain(|part| role(WaveBlockTensor::UnitSecondConvolution(unit, part)), &[channels, channels, 1], channels);
            }
        }
        tensors.snake(|part| wave(WaveTensor::EndSnake(part)), channels);
        tensors.plain(|part| wave(WaveTensor::End(part)), &[1, channels, TAPS], 1);
        tensors.0
    }
}
