//! A node at work: its data directory, models loaded, answers, where each expert is run, profiles and trust.

#![expect(missing_docs, reason = "the crates of the node are public to one another only, and many a name says it all")]

pub mod announcer;
pub mod claims;
pub mod command;
pub mod daemon;
pub mod data_dir;
pub mod dispatcher;
pub(crate) mod evidence;
pub mod federation;
pub mod generation;
pub mod library;
pub mod loading;
pub mod measuring;
pub mod media;
pub mod memory;
pub mod message_files;
pub mod models;
pub mod opinions;
pub mod peer_book;
pub mod places;
pub mod probes;
pub mod profiles;
pub mod prompt;
pub mod pulling;
pub mod sandbox;
pub mod specialists;
pub mod towers;
pub mod usage;
