//! A model's eyes and ears: fetched and loaded when a prompt first needs them, and what they made of a medium kept for the next question about it.

use std::collections::VecDeque;
use std::sync::Arc;

use base::failure::Failure;
use base::output::{human_bytes, note};
use inference::aligned::AlignedBytes;
use inference::engine::Engine;
use inference::expert_source::SourceError;
use inference::generate::TowerSource;
use inference::media::prompt::{PreparedMedium, RowSource};
use inference::tower::TowerRows;
use inference::tower::audio::AudioTower;
use inference::tower::vision::VisionTower;
use protocol::manifest::Part;
use protocol::{BlobRef, ContentHash, ModelManifest, PartKind};
use store::BlobStore;

use crate::federation::{Federation, part_tensors};

/// Rows of media that are kept, in bytes.
const ROWS_BYTES_MAX: usize = 64 << 20;

/// The towers of a model.
pub struct Towers {
    manifest: Arc<ModelManifest>,
    store: Arc<BlobStore>,
    federation: Federation,
    vision: Option<VisionTower>,
    audio: Option<AudioTower>,
    /// What was made last, the newest at the end.
    rows: VecDeque<((ContentHash, RowSource), Arc<TowerRows>)>,
}

impl Towers {
    /// None of them is loaded yet.
    pub(crate) fn new(manifest: &Arc<ModelManifest>, store: &Arc<BlobStore>, federation: &Federation) -> Self {
        Self {
            manifest: Arc::clone(manifest),
            store: Arc::clone(store),
            federation: federation.clone(),
            vision: None,
            audio: None,
            rows: VecDeque::new(),
        }
    }

    fn make(&mut self, engine: &Engine, medium: &PreparedMedium, source: RowSource) -> Result<TowerRows, Failure> {
        let missing = |what: &str| Failure::new(base::failure::Kind::Usage, format!("this model takes no {what}s"));
        match (source, &medium.patches, &medium.spectrum) {
            (RowSource::Vision, Some(patches), _) => {
                if self.vision.is_none() {
                    self.bring(engine, PartKind::Vision, "picture")?;
                    let (federation, store) = (self.federation.clone(), Arc::clone(&self.store));
                    let mut read = |blob: BlobRef| read_blob(&federation, engine, &store, blob);
                    self.vision = Some(VisionTower::load(&self.manifest, &mut read)?);
                }
                let tower = self.vision.as_ref().ok_or_else(|| missing("picture"))?;
                Ok(tower.run(engine.machine(), patches, None))
            }
            (RowSource::Audio, _, Some(spectrum)) => {
                if self.audio.is_none() {
                    self.bring(engine, PartKind::Audio, "sound")?;
                    let (federation, store) = (self.federation.clone(), Arc::clone(&self.store));
                    let mut read = |blob: BlobRef| read_blob(&federation, engine, &store, blob);
                    self.audio = Some(AudioTower::load(&self.manifest, &mut read)?);
                }
                let tower = self.audio.as_ref().ok_or_else(|| missing("sound"))?;
                Ok(tower.run(engine.machine(), spectrum, None))
            }
            (RowSource::Vision, ..) => Err(missing("picture")),
            (RowSource::Audio, ..) => Err(missing("sound")),
        }
    }

    /// Fetches a tower where it is not here, and makes room for it beside the experts.
    fn bring(&self, engine: &Engine, kind: PartKind, what: &str) -> Result<(), Failure> {
        if self.manifest.part(kind).is_none() {
            return Err(Failure::new(base::failure::Kind::Usage, format!("this model takes no {what}s")));
        }
        let fetched = self.federation.bring(&self.store, &part_tensors(&self.manifest, kind), kind.name())?;
        if fetched > 0 {
            note(&format!("fetched the {kind} tower, {}", human_bytes(fetched)));
        }
        let bytes = self.manifest.part(kind).map_or(0, Part::trunk_bytes);
        let mut memory = engine.machine().experts().lock();
        let left = memory.bytes_max().saturating_sub(bytes);
        memory.set_bytes_max(left);
        Ok(())
    }
}

fn read_blob(federation: &Federation, engine: &Engine, store: &Arc<BlobStore>, blob: BlobRef) -> Result<Arc<AlignedBytes>, Failure> {
    engine.machine().tensor(blob, |bytes| federation.read_into(store, blob, bytes))
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
