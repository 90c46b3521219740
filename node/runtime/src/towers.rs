//! A model's eyes and ears: fetched and loaded when a prompt first needs them, let go when none has for a while, and what they made of a
//! medium kept for the next question about it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::clock::instant;
use base::failure::{Failure, Kind};
use base::output::{human_bytes, note};
use inference::aligned::AlignedBytes;
use inference::engine::Engine;
use inference::expert_source::SourceError;
use inference::generate::TowerSource;
use inference::media::prompt::{PreparedMedium, RowSource};
use inference::memory::least_of_experts;
use inference::tower::TowerRows;
use inference::tower::audio::AudioTower;
use inference::tower::vision::VisionTower;
use inference::weights::LoadError;
use protocol::manifest::Part;
use protocol::{BlobRef, ContentHash, ModelManifest, PartKind};
use store::BlobStore;

use crate::federation::{Federation, part_tensors};

/// Rows of media that are kept, in bytes.
const ROWS_BYTES_MAX: usize = 64 << 20;
/// How long a tower stays in memory that no prompt needs.
const TOWER_KEPT: Duration = Duration::from_secs(300);

/// The towers of a model.
pub struct Towers {
    files: Files,
    vision: Option<InMemory<VisionTower>>,
    audio: Option<InMemory<AudioTower>>,
    /// What was made last, the newest at the end.
    rows: VecDeque<((ContentHash, RowSource), Arc<TowerRows>)>,
}

/// What towers are loaded from.
struct Files {
    manifest: Arc<ModelManifest>,
    store: Arc<BlobStore>,
    federation: Federation,
}

/// A tower in memory.
struct InMemory<T> {
    tower: T,
    kind: PartKind,
    /// What it takes of the memory for experts.
    bytes: u64,
    /// When a prompt last needed it.
    used: Instant,
}

impl Towers {
    /// None of them is loaded yet.
    pub(crate) fn new(manifest: &Arc<ModelManifest>, store: &Arc<BlobStore>, federation: &Federation) -> Self {
        let files = Files { manifest: Arc::clone(manifest), store: Arc::clone(store), federation: federation.clone() };
        Self { files, vision: None, audio: None, rows: VecDeque::new() }
    }

    fn make(&mut self, engine: &Engine, medium: &PreparedMedium, source: RowSource) -> Result<TowerRows, Failure> {
        let Files { manifest, .. } = &self.files;
        match (source, manifest.vision(), manifest.audio(), &medium.patches, &medium.spectrum) {
            (RowSource::Vision, Some(shape), _, Some(patches), _) => {
                let bytes = VisionTower::work_bytes(shape, patches.grid.iter().product());
                let tower = self.files.have(&mut self.vision, engine, PartKind::Vision, |read| VisionTower::load(manifest, read))?;
                within(engine, manifest, bytes, "looking at this", || tower.run(engine.machine(), patches, None))
            }
            (RowSource::Audio, _, Some(shape), _, Some(spectrum)) => {
                let bytes = AudioTower::work_bytes(shape, spectrum.len() / shape.bands as usize);
                let tower = self.files.have(&mut self.audio, engine, PartKind::Audio, |read| AudioTower::load(manifest, read))?;
                within(engine, manifest, bytes, "listening to this", || tower.run(engine.machine(), spectrum, None))
            }
            (RowSource::Vision, ..) => Err(Failure::new(Kind::Usage, "this model takes no pictures")),
            (RowSource::Audio, ..) => Err(Failure::new(Kind::Usage, "this model takes no sounds")),
        }
    }

    /// Lets go of towers that no prompt has needed for a while; experts have their memory again.
    pub(crate) fn let_go_of_idle(&mut self, engine: &Engine) {
        let_go(&mut self.vision, engine, TOWER_KEPT);
        let_go(&mut self.audio, engine, TOWER_KEPT);
    }

    /// Lets go of all towers. Says whether there were any.
    pub(crate) fn let_go(&mut self, engine: &Engine) -> bool {
        let any = self.vision.is_some() || self.audio.is_some();
        let_go(&mut self.vision, engine, Duration::ZERO);
        let_go(&mut self.audio, engine, Duration::ZERO);
        any
    }

    /// How long until the first of the towers has been idle for long enough to go.
    pub(crate) fn until_idle(&self) -> Option<Duration> {
        let used = self.vision.iter().map(|tower| tower.used).chain(self.audio.iter().map(|tower| tower.used));
        used.map(|used| TOWER_KEPT.saturating_sub(instant() - used)).min()
    }
}

impl Files {
    /// A tower: in memory already, or fetched where it is not here, and loaded.
    fn have<'a, T>(
        &self,
        place: &'a mut Option<InMemory<T>>,
        engine: &Engine,
        kind: PartKind,
        load: impl FnOnce(&mut dyn FnMut(BlobRef) -> Result<Arc<AlignedBytes>, Failure>) -> Result<T, LoadError<Failure>>,
    ) -> Result<&'a T, Failure> {
        if place.is_none() {
            let fetched = self.federation.bring(&self.store, &part_tensors(&self.manifest, kind), kind.name())?;
            if fetched > 0 {
                note(&format!("fetched the {kind} tower, {}", human_bytes(fetched)));
            }
            let bytes = self.manifest.part(kind).map_or(0, Part::trunk_bytes);
            take(engine, &self.manifest, bytes, &format!("the {kind} tower"))?;
            let mut read = |blob: BlobRef| engine.machine().tensor(blob, |bytes| self.federation.read_into(&self.store, blob, bytes));
            match load(&mut read) {
                Ok(tower) => *place = Some(InMemory { tower, kind, bytes, used: instant() }),
                Err(error) => {
                    give_back(engine, bytes);
                    return Err(error.into());
                }
            }
        }
        let here = place.as_mut().expect("it was loaded just now, if it was not here");
        here.used = instant();
        Ok(&here.tower)
    }
}

fn let_go<T>(place: &mut Option<InMemory<T>>, engine: &Engine, kept: Duration) {
    if let Some(here) = place.take_if(|here| instant() - here.used >= kept) {
        note(&format!("let go of the {} tower, {}", here.kind, human_bytes(here.bytes)));
        let bytes = here.bytes;
        drop(here);
        give_back(engine, bytes);
    }
}

/// Takes memory of the experts, who must keep enough for a token.
fn take(engine: &Engine, manifest: &ModelManifest, bytes: u64, what: &str) -> Result<(), Failure> {
    let mut memory = engine.machine().experts().lock();
    let (all, least) = (memory.bytes_max(), least_of_experts(manifest));
    let Some(left) = all.checked_sub(bytes).filter(|&left| left >= least) else {
        let missing = human_bytes((bytes + least).saturating_sub(all));
        let text = format!("{what} takes {}, which is {missing} more memory than there is beside the model (--ram)", human_bytes(bytes));
        return Err(Failure::new(Kind::Usage, text));
    };
    memory.set_bytes_max(left);
    Ok(())
}

fn give_back(engine: &Engine, bytes: u64) {
    let mut memory = engine.machine().experts().lock();
    let all = memory.bytes_max() + bytes;
    memory.set_bytes_max(all);
}

/// Does `work`, and keeps `bytes` of memory from the experts meanwhile.
fn within<T>(engine: &Engine, manifest: &ModelManifest, bytes: u64, what: &str, work: impl FnOnce() -> T) -> Result<T, Failure> {
    take(engine, manifest, bytes, what)?;
    let done = work();
    give_back(engine, bytes);
    Ok(done)
}

impl TowerSource for Towers {
    fn rows(&mut self, engine: &Engine, medium: &PreparedMedium, source: RowSource) -> Result<Arc<TowerRows>, SourceError> {
        let key = (medium.hash, source);
        if let Some((_, made)) = self.rows.iter().find(|(known, _)| *known == key) {
            return Ok(Arc::clone(made));
        }
        let made = Arc::new(self.make(engine, medium, source).map_err(|failure| SourceError(Box::new(failure)))?);
        self.rows.push_back((key, Arc::clone(&made)));
        let bytes = |rows: &VecDeque<(_, Arc<TowerRows>)>| rows.iter().map(|(_, rows)| rows.bytes()).sum::<usize>();
        while bytes(&self.rows) > ROWS_BYTES_MAX && self.rows.len() > 1 {
            self.rows.pop_front();
        }
        Ok(made)
    }
}
