//! Cross-crate tests: the engine against transformers, and the real binary against everything a user or a peer may do.

mod binary;
mod cli;
mod engine;
mod hostile;
mod nodes;
mod parity;
mod refusals;
mod support;
