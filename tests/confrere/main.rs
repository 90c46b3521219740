//! Cross-crate tests: the engine against transformers, and the real binary against everything a user or a peer may do.

mod api;
mod binary;
mod chat;
mod cli;
mod crowd;
mod discovery;
mod endurance;
mod engine;
mod exchange;
mod execute;
mod false_executor;
mod floods;
mod floors;
mod foreign_text;
mod forgery;
mod fuzz;
mod gossip;
mod help;
mod hostile;
mod import_memory;
mod nodes;
mod parity;
mod profiles;
mod refusals;
mod slow_link;
mod support;
