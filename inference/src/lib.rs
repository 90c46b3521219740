//! The engine: bytes and tokens in, tokens out.
//!
//! Goals: the same tokens whatever the batch, the cache, the threads or the order in which experts arrive; a checkpoint is
//! read completely or refused with the list of what is wrong.
//! Non-goals: it does not know where experts come from (see [`expert_source`]), keeps nothing on disk, has no clock and
//! no network.

pub mod activation_log;
pub mod aligned;
pub mod cache_policy;
pub mod calibration;
pub mod chat;
pub mod checkpoint;
pub mod control_tokens;
pub mod convert;
pub mod engine;
pub mod expert;
pub mod expert_memory;
pub mod expert_runner;
pub mod expert_source;
pub mod expert_use;
pub mod experts;
pub mod generate;
pub mod kernels;
mod layer_inputs;
pub mod machine;
pub mod media;
pub mod memory;
mod mixer;
pub mod model;
mod moe_layer;
mod moments;
pub mod perplexity;
mod pool;
pub mod probe;
pub mod probe_tokens;
pub mod profiler;
pub mod random;
pub mod reference;
pub mod requantize;
mod retention;
pub mod router;
pub mod sampler;
pub mod session;
mod swiglu;
pub mod tokenizer;
pub mod tokenizer_rules;
pub mod tower;
pub mod weights;
mod work;
mod work_sizes;

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian and are multiplied where they lie");
