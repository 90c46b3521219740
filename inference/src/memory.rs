//! How a budget of memory is divided among trunk, keys and values, working memory and experts, before a model is loaded.

use protocol::ModelManifest;

use crate::aligned::AlignedBytes;
use crate::engine::EngineOptions;
use crate::machine::Machine;
use crate::mixer::kv_cache::KvCache;

/// The shares of a budget, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryPlan {
    /// The trunk.
    pub trunk: u64,
    /// Keys and values of all sequences.
    pub kv_cache: u64,
    /// What a pass works in, as far as the machine does not have it for other models, and what it leaves behind.
    pub scratch: u64,
    /// Everything else that the process needs.
    pub process: u64,
    /// What is left for experts.
    pub experts: u64,
    /// Tokens that go through the layers together at most.
    pub batch_tokens: usize,
}

/// A budget that is too small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given} bytes of memory are not enough for this model: {needed} would do ({trunk} trunk, {kv_cache} keys and values of {kv_tokens} tokens, \
     {scratch} scratch, {process} process, {experts} experts); a shorter --context needs less"
)]
pub struct BudgetTooSmall {
    /// What there is.
    pub given: u64,
    /// What would do.
    pub needed: u64,
    trunk: u64,
    kv_cache: u64,
    scratch: u64,
    process: u64,
    experts: u64,
    kv_tokens: usize,
}

/// Bytes of as many experts as a token needs in all layers: with less, a model is not run.
pub fn least_of_experts(manifest: &ModelManifest) -> u64 {
    let (part, decoder) = (manifest.text(), manifest.decoder());
    let one = AlignedBytes::taken(part.largest_expert() as usize);
    decoder.moe_layers().count() as u64 * u64::from(decoder.experts_per_token()) * one
}

/// Smallest batch that memory is saved by.
const BATCH_TOKENS_MIN: usize = 32;

/// Divides `budget` bytes for a model on `machine`, or on one of its own; `process` is what the process needs besides. At least layers × top-k experts must fit; a larger batch is given
/// up for more experts only when they would not.
pub fn plan_memory(
    manifest: &ModelManifest,
    options: &EngineOptions,
    machine: Option<&Machine>,
    process: u64,
    budget: u64,
) -> Result<MemoryPlan, BudgetTooSmall> {
    let (part, decoder) = (manifest.text(), manifest.decoder());
    let trunk = part.trunk_bytes();
    let context = options.context.min(decoder.context as usize);
    let kv_cache = KvCache::bytes(decoder, options.kv, options.kv_tokens.max(context));
    let least = least_of_experts(manifest);
    let mut batch_tokens = options.batch_tokens.clamp(1, context.max(1));
    loop {
        let options = EngineOptions { batch_tokens, context, ..*options };
        let scratch = options.work_bytes(manifest, part.kind, machine);
        let taken = trunk + kv_cache + scratch + process;
        // A batch must not take more than an eighth of what experts could have.
        let fits = taken + least <= budget && (scratch <= (budget - taken) / 8 || batch_tokens <= BATCH_TOKENS_MIN);
        if fits {
            return Ok(MemoryPlan { trunk, kv_cache, scratch, process, experts: budget - taken, batch_tokens });
        }
        if batch_tokens <= BATCH_TOKENS_MIN {
            let needed = taken + least;
            return Err(BudgetTooSmall {
                given: budget,
                needed,
                trunk,
                kv_cache,
                scratch,
                process,
                experts: least,
                kv_tokens: options.kv_tokens.max(context),
            });
        }
        batch_tokens = (batch_tokens / 2).max(BATCH_TOKENS_MIN);
    }
}
