//! The same model on candle's operations: slow, plain, and independent of our kernels, to compare with.
//!
//! A whole sequence at once, in f32, without a cache. Nothing of the engine's arithmetic is used here, so that an error
//! in one does not hide in the other.

use candle_core::{D, DType, Device, IndexOp, Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use candle_nn::rotary_emb::rope;
use half::{bf16, f16};
use protocol::decoder::{Head, QkNorm, QkvBias, Router, SharedExpert};
use protocol::expert_blob::ExpertShape;
use protocol::tensors::{LayerTensor, TensorRole};
use protocol::{BlobRef, Decoder, ExpertSlot, ModelManifest, Precision};

/// Gets the bytes of a blob; they are not verified here.
pub type ReadBlob<'a> = &'a mut dyn FnMut(BlobRef) -> std::result::Result<Vec<u8>, String>;

/// Returns the logits, (tokens, vocab_size), of a whole sequence.
pub fn reference_logits(manifest: &ModelManifest, tokens: &[u32], read: ReadBlob<'_>) -> std::result::Result<Vec<f32>, String> {
    let mut reference = Reference { manifest, decoder: manifest.decoder(), read };
    reference.logits(tokens).and_then(|logits| logits.flatten_all()?.to_vec1()).map_err(|error| error.to_string())
}

struct Reference<'a> {
    manifest: &'a ModelManifest,
    decoder: &'a Decoder,
    read: ReadBlob<'a>,
}

impl Reference<'_> {
    fn logits(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let eps = self.decoder.final_norm.eps() as f32;
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        let embedding = self.trunk(TensorRole::Embedding)?;
        let mut x = embedding.index_select(&ids, 0)?; // (tokens, hidden_size)
        for layer in 0..self.decoder.layers() {
            let normed = rms_norm(&x, &self.of_layer(layer, LayerTensor::MixerNorm)?, eps)?;
            x = (x + self.attention(&normed, layer)?)?;
            let normed = rms_norm(&x, &self.of_layer(layer, LayerTensor::FeedForwardNorm)?, eps)?;
            let dense = [LayerTensor::Gate, LayerTensor::Up, LayerTensor::Down];
            let out = if self.decoder.is_moe(layer) { self.moe(&normed, layer)? } else { self.dense(&normed, layer, dense)? };
            x = (x + out)?;
        }
        let x = rms_norm(&x, &self.trunk(TensorRole::FinalNorm)?, eps)?;
        let head = if self.decoder.head == Head::Embedding { embedding } else { self.trunk(TensorRole::Head)? };
        x.matmul(&head.t()?)
    }

    fn attention(&mut self, x: &Tensor, layer: u32) -> Result<Tensor> {
        let shape = self.decoder.attention();
        let (tokens, head_dim) = (x.dim(0)?, shape.head_dim as usize);
        let eps = self.decoder.final_norm.eps() as f32;
        let spread_norm = shape.qk_norm == QkNorm::AllHeads;
        // (1, heads, tokens, head_dim)
        let mut project = |part: LayerTensor, bias: LayerTensor, norm: Option<LayerTensor>, heads: u32| -> Result<Tensor> {
            let mut y = x.matmul(&self.of_layer(layer, part)?.t()?)?;
            if shape.bias == QkvBias::Each {
                y = y.broadcast_add(&self.of_layer(layer, bias)?)?;
            }
            if let Some(norm) = norm.filter(|_| spread_norm) {
                y = rms_norm(&y, &self.of_layer(layer, norm)?, eps)?;
            }
            y.reshape((1, tokens, heads as usize, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let q = project(LayerTensor::Query, LayerTensor::QueryBias, Some(LayerTensor::QueryNorm), shape.heads)?;
        let k = project(LayerTensor::Key, LayerTensor::KeyBias, Some(LayerTensor::KeyNorm), shape.kv_heads)?;
        let v = project(LayerTensor::Value, LayerTensor::ValueBias, None, shape.kv_heads)?;
        let exponents: Vec<f32> = (0..head_dim / 2).map(|i| 2.0 * i as f32 / head_dim as f32).collect();
        let frequencies: Vec<f32> = exponents.iter().map(|e| (shape.rope.base() as f32).powf(-e)).collect();
        let positions = Tensor::arange(0u32, tokens as u32, &Device::Cpu)?.to_dtype(DType::F32)?.reshape((tokens, 1))?;
        let angles = positions.matmul(&Tensor::new(frequencies, &Device::Cpu)?.reshape((1, head_dim / 2))?)?;
        let mut turn = |x: &Tensor, norm: LayerTensor| {
            let normed = if shape.qk_norm == QkNorm::PerHead { rms_norm(x, &self.of_layer(layer, norm)?, eps)? } else { x.clone() };
            rope(&normed, &angles.cos()?, &angles.sin()?)
        };
        let (q, k) = (turn(&q, LayerTensor::QueryNorm)?, turn(&k, LayerTensor::KeyNorm)?);
        let groups = (shape.heads / shape.kv_heads) as usize;
        let spread = |x: Tensor| -> Result<Tensor> {
            let (_, heads, tokens, head_dim) = x.dims4()?;
            let x = x.unsqueeze(2)?.broadcast_as((1, heads, groups, tokens, head_dim))?;
            x.contiguous()?.reshape((1, heads * groups, tokens, head_dim))
        };
        let (k, v) = (spread(k)?, spread(v)?);
        let mask: Vec<f32> = (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 }).collect();
        let scores = (q.matmul(&k.t()?.contiguous()?)? / f64::from(shape.head_dim).sqrt())?;
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu)?)?;
        let mixed = softmax_last_dim(&scores)?.matmul(&v)?;
        let mixed = mixed.transpose(1, 2)?.contiguous()?.reshape((tokens, shape.heads as usize * head_dim))?;
        mixed.matmul(&self.of_layer(layer, LayerTensor::Output)?.t()?)
    }

    fn dense(&mut self, x: &Tensor, layer: u32, tensors: [LayerTensor; 3]) -> Result<Tensor> {
        let [gate, up, down] = tensors.map(|tensor| self.of_layer(layer, tensor));
        swiglu(x, &gate?, &up?, &down?)
    }

    fn moe(&mut self, x: &Tensor, layer: u32) -> Result<Tensor> {
        let moe = self.decoder.moe().expect("this layer has experts").clone();
        let router = self.of_layer(layer, LayerTensor::Router)?;
        let probabilities = softmax_last_dim(&x.matmul(&router.t()?)?)?;
        let (tokens, _) = x.dims2()?;
        let chosen = probabilities.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, moe.per_token as usize)?.contiguous()?;
        let mut weights = probabilities.gather(&chosen, D::Minus1)?;
        let Router::Softmax { normalise } = moe.router;
        if normalise {
            weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        }
        let (chosen, weights) = (chosen.to_vec2::<u32>()?, weights.to_vec2::<f32>()?);
        let mut out = Vec::new();
        for token in 0..tokens {
            let row = x.i(token)?.unsqueeze(0)?;
            let mut sum = row.zeros_like()?;
            for (&expert, &weight) in chosen[token].iter().zip(&weights[token]) {
                let [gate, up, down] = self.expert(ExpertSlot::text(layer, expert))?;
                sum = (sum + (swiglu(&row, &gate, &up, &down)? * f64::from(weight))?)?;
            }
            out.push(sum);
        }
        let out = Tensor::cat(&out, 0)?;
        if moe.shared == SharedExpert::None {
            return Ok(out);
        }
        let shared = self.dense(x, layer, [LayerTensor::SharedGate, LayerTensor::SharedUp, LayerTensor::SharedDown])?;
        let weight = candle_nn::ops::sigmoid(&x.matmul(&self.of_layer(layer, LayerTensor::SharedWeight)?.t()?)?)?;
        out + shared.broadcast_mul(&weight)?
    }

    fn of_layer(&mut self, layer: u32, tensor: LayerTensor) -> Result<Tensor> {
        self.trunk(TensorRole::Layer(layer, tensor))
    }

    fn trunk(&mut self, role: TensorRole) -> Result<Tensor> {
        let specs = self.decoder.tensors();
        let found = self.manifest.text().trunk.iter().zip(&specs).find(|(tensor, _)| tensor.role == role);
        let (tensor, spec) = found.ok_or_else(|| candle_core::Error::Msg(format!("no tensor {role}")))?;
        let bytes = (self.read)(tensor.blob).map_err(candle_core::Error::Msg)?;
        let shape: Vec<usize> = spec.shape.iter().map(|&side| side as usize).collect();
        {
            let (rows, columns) = spec.sides();
            Tensor::from_vec(widen(&bytes, tensor.precision, rows, columns), shape, &Device::Cpu)
        }
    }

    fn expert(&mut self, slot: ExpertSlot) -> Result<[Tensor; 3]> {
        let blob = self.manifest.expert(slot).ok_or_else(|| candle_core::Error::Msg(format!("no {slot}")))?;
        let bytes = (self.read)(blob.blob).map_err(candle_core::Error::Msg)?;
        let shape = ExpertShape::of_blob(&bytes).map_err(candle_core::Error::wrap)?;
        let (hidden, middle) = (shape.hidden_size, shape.intermediate_size);
        let ([gate, up, down], precisions) = (shape.planes(), shape.precision.of_planes());
        let plane = |place, precision, rows, columns| {
            Tensor::from_vec(widen(&bytes[place], precision, rows, columns), (rows, columns), &Device::Cpu)
        };
        Ok([
            plane(gate, precisions[0], middle, hidden)?,
            plane(up, precisions[1], middle, hidden)?,
            plane(down, precisions[2], hidden, middle)?,
        ])
    }
}

fn swiglu(x: &Tensor, gate: &Tensor, up: &Tensor, down: &Tensor) -> Result<Tensor> {
    let gate = candle_nn::ops::silu(&x.matmul(&gate.t()?)?)?;
    (gate * x.matmul(&up.t()?)?)?.matmul(&down.t()?)
}

fn widen(bytes: &[u8], precision: Precision, rows: usize, columns: usize) -> Vec<f32> {
    match precision {
        Precision::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Precision::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Precision::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => (0..rows * columns).map(|i| unpack(bytes, precision, columns, i / columns, i % columns)).collect(),
    }
}

/// One weight of a packed matrix, read as `docs/expert-function.md` draws it.
fn unpack(bytes: &[u8], precision: Precision, columns: usize, row: usize, column: usize) -> f32 {
    let block_of = |head: usize, size: usize| &bytes[head + (row / 16 * columns.div_ceil(32) + column / 32) * size..][..size];
    let (row, column) = (row % 16, column % 32);
    let byte = |codes: &[u8], word: usize| codes[64 * word + 4 * row + column % 4];
    let half = |codes: &[u8]| byte(codes, column / 4 % 4) >> (column / 16 * 4) & 15;
    let pair = |codes: &[u8]| byte(codes, column / 16) >> (column % 16 / 4 * 2) & 3;
    let long = |block: &[u8]| f16::from_le_bytes([block[2 * row], block[2 * row + 1]]).to_f32();
    let short = |block: &[u8]| {
        let (stored, sign) = (i32::from(block[row] & 127), if block[row] > 127 { -1.0 } else { 1.0 });
        let exponent = stored / 8 + i32::from(bytes[0]) - 127;
        if stored == 0 { 0.0 } else { sign * (1.0 + (stored % 8) as f32 / 8.0) * f32::powi(2.0, exponent) }
    };
    match precision {
        Precision::Q6 => {
            let block = block_of(0, 416);
            long(block) * (f32::from(half(&block[32..])) + 16.0 * f32::from(pair(&block[288..])) - 32.0)
        }
        Precision::Q4 => {
            let block = block_of(0, 288);
            long(block) * (f32::from(half(&block[32..])) - 8.0)
        }
        Precision::Q3 => {
            let block = block_of(64, 208);
            let code = pair(&block[16..]) + 4 * (byte(&block[144..], 0) >> (column / 4) & 1);
            short(block) * [-127.0, -76.0, -44.0, -18.0, 8.0, 34.0, 65.0, 106.0][usize::from(code)]
        }
        Precision::Q2 => {
            let block = block_of(64, 144);
            short(block) * [-127.0, -44.0, 18.0, 90.0][usize::from(pair(&block[16..]))]
        }
        _ => {
            let block = block_of(0, 544);
            long(block) * (f32::from(byte(&block[32..], column / 4)) - 128.0)
        }
    }
}
