//! A model that is being measured with a probe set: reading goes on where an earlier one was broken off.

use base::failure::Failure;
use base::output::{count_bar, note};
use inference::engine::EngineOptions;
use inference::profiler::{ProfileError, Profiler};
use protocol::ContentHash;

use crate::command::{Context, EngineArgs};
use crate::data_dir::{LocalModel, OpenDataDir};
use crate::federation::Federation;
use crate::loading::Loaded;
use crate::probes::Probes;
use crate::profiles::{Journal, ProfileStep};

/// A model that is being measured.
pub struct Measuring {
    pub loaded: Loaded,
    pub profiler: Profiler,
    pub build_profile: ContentHash,
}

impl Measuring {
    /// Loads a model and gets its probes ready.
    pub fn new(
        context: &Context,
        (open, found): (&OpenDataDir, &LocalModel),
        federation: &Federation,
        engine: &EngineArgs,
        probes: &Probes,
    ) -> Result<Self, Failure> {
        let window = (found.manifest.decoder().context as usize).min(probes.tokens_max());
        // Whoever reads less of a probe counts otherwise.
        let options = EngineOptions { context: window, ..engine.options(&found.manifest, Some(window)) };
        let loaded = federation.load(open, found, context.memory_max, options)?;
        let profiler = profiler(&loaded, found, probes)?;
        Ok(Self { loaded, profiler, build_profile: build_profile(&options) })
    }

    /// Takes in what an earlier build has read with the same probes, and goes on in its journal.
    pub fn resume(&mut self, open: &OpenDataDir, found: &LocalModel, probes: &Probes) -> Result<Journal, Failure> {
        let set = probes.set.hash();
        let begun = ProfileStep::Begun(set, self.build_profile);
        let (mut journal, steps) = Journal::open(&open.dir, found.id, set, self.build_profile)?;
        let anew = steps.is_empty();
        if resume(&mut self.profiler, &begun, steps).is_err() {
            if !anew {
                note("warning: what was measured earlier is damaged; it is measured anew");
            }
            self.profiler = profiler(&self.loaded, found, probes)?;
            journal.clear()?;
            journal.add(&begun)?;
        }
        Ok(journal)
    }

    /// Reads all probes; `go_on` is asked after each, and `note_down` given what came of it. Says whether it got to the end.
    pub fn read_all(
        &mut self,
        go_on: impl Fn() -> bool,
        mut note_down: impl FnMut(ProfileStep) -> Result<(), Failure>,
    ) -> Result<bool, Failure> {
        let bar = count_bar(self.profiler.tokens(), "probes", "tokens");
        loop {
            bar.set_position(self.profiler.tokens_read());
            let Some(reading) = self.profiler.read_next(&mut self.loaded.engine, &mut self.loaded.towers)? else {
                bar.finish_and_clear();
                return Ok(true);
            };
            note_down(ProfileStep::Read(reading))?;
            if !go_on() {
                let is_read = self.profiler.tokens_read() == self.profiler.tokens();
                bar.finish_and_clear();
                return Ok(is_read);
            }
        }
    }
}

/// The arithmetic that counts depend on: who uses another may count otherwise.
pub fn build_profile(options: &EngineOptions) -> ContentHash {
    ContentHash::of(format!("confrere-forward/1 trials=2 kv={}", options.kv).as_bytes())
}

fn profiler(loaded: &Loaded, found: &LocalModel, probes: &Probes) -> Result<Profiler, Failure> {
    let tokens = probes.tokens(&loaded.text, &found.manifest, loaded.engine.context())?;
    Ok(Profiler::new(&loaded.engine, found.id, probes.set.hash(), tokens)?)
}

/// Takes in the steps of an earlier build, if they are about the same.
fn resume(profiler: &mut Profiler, begun: &ProfileStep, steps: Vec<ProfileStep>) -> Result<(), ProfileError> {
    let mut steps = steps.into_iter();
    if steps.next().as_ref() != Some(begun) {
        return Err(ProfileError::Other);
    }
    for step in steps {
        match step {
            ProfileStep::Begun(..) => return Err(ProfileError::Other),
            ProfileStep::Read(reading) => profiler.take_reading(reading)?,
            ProfileStep::Tried(found) => found.into_iter().try_for_each(|trials| profiler.take_trials(trials))?,
        }
    }
    Ok(())
}
