//! Pictures, videos and sound: from files to what goes into towers. `docs/omni.md` defines each step.

pub mod limits;
pub mod patches;
pub mod picture;
pub mod prompt;
pub mod resize;
pub mod sound;
pub mod spectrum;
