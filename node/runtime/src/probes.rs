//! The probe sets that ship with Confrere, and those that users bring.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use base::failure::{Failure, Kind, io_failure};
use include_dir::{Dir, include_dir};
use inference::chat::{ContentPart, MediumKind};
use inference::engine::Position;
use inference::media::limits::MediaLimits;
use inference::media::prompt::MediaPrompt;
use inference::probe_tokens::{PROBE_TOKENS_MAX, ProbeTokens, QUESTION_TOKENS_MAX};
use inference::tokenizer::{SpecialTokens, Tokenizer};
use protocol::profile::{Probe, ProbeMedium, ProbePart, ProbeSet, ProbeSetError};
use protocol::{ContentHash, ModelManifest};

use crate::media::{MediaSound, MediaSource, Senses, prepare};
use crate::message_files::{Question, bytes_of, questions_of, read_questions};
use crate::prompt::ModelText;

const SHIPPED: [(&str, &str); 9] = [
    ("chinese_poetry", include_str!("../probes/chinese_poetry.txt")),
    ("code", include_str!("../probes/code.txt")),
    ("dialogue", include_str!("../probes/dialogue.txt")),
    ("law", include_str!("../probes/law.txt")),
    ("manuals", include_str!("../probes/manuals.txt")),
    ("maths", include_str!("../probes/maths.txt")),
    ("poetry", include_str!("../probes/poetry.txt")),
    ("prose", include_str!("../probes/prose.txt")),
    ("stories", include_str!("../probes/stories.txt")),
];

/// A probe set, and where its media are.
pub struct Probes {
    /// The set.
    pub set: ProbeSet,
    /// The questions of its domains, in the order of their probes.
    questions: BTreeMap<String, Vec<Question>>,
}

/// Questions about pictures, sounds and videos, and the media.
static OMNI: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/probes/omni");
/// The hash of the set with them.
const OMNI_HASH: &str = "b3:de06939565f778dc67c0a6e4b15390b1c179061158860c601023d0def1af81af";
/// The domain of text that is not asked of a model with eyes and ears: a set has no room for more.
const NOT_OF_OMNI: &str = "prose";

/// The probe set of texts that ships with Confrere.
pub fn shipped() -> Probes {
    Probes { set: ProbeSet::from_texts(SHIPPED).expect("a test reads it"), questions: BTreeMap::new() }
}

/// The shipped probe set of texts, pictures, sounds and videos.
pub fn shipped_omni() -> Probes {
    let texts = ProbeSet::from_texts(SHIPPED.into_iter().filter(|(name, _)| *name != NOT_OF_OMNI)).expect("a test reads it");
    let (mut domains, mut questions) = (texts.domains().clone(), BTreeMap::new());
    for file in OMNI.files().filter(|file| file.path().extension().is_some_and(|extension| extension == "jsonl")) {
        let mut read = questions_of(file.path(), file.contents_utf8().expect("a test reads it")).expect("a test reads it");
        for given in read.iter_mut().flat_map(|question| &mut question.media) {
            let sound = given.sound.as_mut().and_then(|sound| if let MediaSound::Other(source) = sound { Some(source) } else { None });
            for source in std::iter::once(&mut given.source).chain(sound) {
                let MediaSource::Path(path) = source else { continue };
                *source = MediaSource::Bytes(OMNI.get_file(&*path).expect("a test reads it").contents().to_vec());
            }
        }
        let name = file.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
        domains.insert(name.clone(), read.iter().map(|question| probe_of(question).expect("a test reads it")).collect());
        questions.insert(name, read);
    }
    Probes { set: ProbeSet::new(domains).expect("a test reads it"), questions }
}

/// The shipped probes for a model: those with pictures and sounds where it has eyes and ears.
pub fn shipped_for(manifest: &ModelManifest) -> Probes {
    if manifest.vision().is_some() && manifest.audio().is_some() { shipped_omni() } else { shipped() }
}

/// The shipped probes of a hash.
pub fn shipped_as(hash: ContentHash) -> Option<Probes> {
    let [texts, omni] = shipped_hashes();
    if hash == omni { Some(shipped_omni()) } else { (hash == texts).then(shipped) }
}

/// The hashes of all shipped probes. Media take memory once they are read, so theirs is written down.
pub fn shipped_hashes() -> [ContentHash; 2] {
    [shipped().set.hash(), OMNI_HASH.parse().expect("a test reads it")]
}

/// The probe set of a directory. For each domain there is a file DOMAIN.txt, with probes between lines of `%%`, or DOMAIN.jsonl, with
/// [questions](read_questions).
pub fn read(dir: &Path) -> Result<Probes, Failure> {
    let wrong = |error: ProbeSetError| Failure::new(Kind::Usage, format!("{}: {error}", dir.display()));
    let (mut domains, mut questions) = (BTreeMap::new(), BTreeMap::new());
    for entry in std::fs::read_dir(dir).map_err(|error| io_failure("list", dir, &error))? {
        let path = entry.map_err(|error| io_failure("list", dir, &error))?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let probes = match path.extension().and_then(|extension| extension.to_str()) {
            Some("txt") => {
                let text = String::from_utf8(bytes_of(&path)?);
                let text = text.map_err(|_| Failure::new(Kind::Usage, format!("{} is not UTF-8", path.display())))?;
                let set = ProbeSet::from_texts([(name.as_str(), text.as_str())]).map_err(wrong)?;
                set.domains()[&name].clone()
            }
            Some("jsonl") => {
                let read = read_questions(&path)?;
                let probes = read.iter().map(probe_of).collect::<Result<_, _>>()?;
                questions.insert(name.clone(), read);
                probes
            }
            _ => continue,
        };
        if domains.insert(name.clone(), probes).is_some() {
            return Err(Failure::new(Kind::Usage, format!("{}: domain {name} has two files", dir.display())));
        }
    }
    Ok(Probes { set: ProbeSet::new(domains).map_err(wrong)?, questions })
}

/// A question with its media by their hashes.
fn probe_of(question: &Question) -> Result<Probe, Failure> {
    let hash = |source: &MediaSource| match source {
        MediaSource::Path(path) => Ok::<_, Failure>(ContentHash::of(&bytes_of(path)?)),
        MediaSource::Bytes(bytes) => Ok(ContentHash::of(bytes)),
    };
    let mut media = question.media.iter();
    let parts = question.content.iter().map(|part| {
        let kind = match part {
            ContentPart::Text(text) => return Ok(ProbePart::Text(text.clone())),
            ContentPart::Medium(kind) => kind,
        };
        let given = media.next().expect("each medium has a part");
        Ok(ProbePart::Medium(match kind {
            MediumKind::Image => ProbeMedium::Image(hash(&given.source)?),
            MediumKind::Audio => ProbeMedium::Audio(hash(&given.source)?),
            MediumKind::Video => {
                let sound = match &given.sound {
                    None => None,
                    Some(MediaSound::Own) => Some(hash(&given.source)?),
                    Some(MediaSound::Other(source)) => Some(hash(source)?),
                };
                ProbeMedium::Video(hash(&given.source)?, (given.fps * 1000.0).round() as u32, sound)
            }
        }))
    });
    Ok(Probe::Question(parts.collect::<Result<_, Failure>>()?, question.answer.clone()))
}

impl Probes {
    /// At most `count` probes of each domain, the first.
    pub fn first(&self, count: usize) -> Result<Self, Failure> {
        let domains = self.set.domains().iter().map(|(name, probes)| (name.clone(), probes.iter().take(count).cloned().collect()));
        let set = ProbeSet::new(domains.collect::<Vec<_>>()).map_err(|error| Failure::new(Kind::Usage, error.to_string()))?;
        let questions = self.questions.iter().map(|(name, questions)| (name.clone(), questions.iter().take(count).cloned().collect()));
        Ok(Self { set, questions: questions.collect() })
    }

    /// Tokens that the longest probe may have.
    pub fn tokens_max(&self) -> usize {
        if self.questions.is_empty() { PROBE_TOKENS_MAX } else { QUESTION_TOKENS_MAX }
    }

    /// The probes as a model reads them, `context` tokens at most each.
    pub fn tokens(&self, text: &ModelText, manifest: &ModelManifest, context: usize) -> Result<Vec<(String, Vec<ProbeTokens>)>, Failure> {
        let missing = || Failure::new(Kind::Usage, "the model has no tokenizer, so it cannot read probes");
        let tokenizer = text.tokenizer.as_ref().ok_or_else(missing)?;
        let domain = |(name, probes): (&String, &Vec<Probe>)| {
            let mut questions = self.questions.get(name).into_iter().flatten();
            let one = |(number, probe): (usize, &Probe)| match probe {
                Probe::Text(probe) => {
                    let mut tokens = tokenizer.encode(probe, SpecialTokens::AsWritten)?;
                    tokens.truncate(PROBE_TOKENS_MAX.min(context));
                    Ok(ProbeTokens { tokens, media: None, answer: None })
                }
                Probe::Question(..) => {
                    let question = questions.next().expect("each has one");
                    let read = question_tokens(question, (text, tokenizer), manifest, context);
                    read.map_err(|failure| failure.about(format_args!("question {number} of {name}")))
                }
            };
            Ok((name.clone(), (1..).zip(probes).map(one).collect::<Result<_, Failure>>()?))
        };
        self.set.domains().iter().map(domain).collect()
    }
}

fn question_tokens(
    question: &Question,
    (text, tokenizer): (&ModelText, &Tokenizer),
    manifest: &ModelManifest,
    context: usize,
) -> Result<ProbeTokens, Failure> {
    let limits = MediaLimits::default();
    let senses = Senses { vision: manifest.vision(), audio: manifest.audio(), limits: &limits };
    let media = prepare(senses, &question.media)?;
    let request = text.question(question.content.clone(), media, context, &manifest.generation)?;
    let mut tokens = request.prompt;
    let answer = tokens.len();
    tokens.extend(tokenizer.encode(&question.answer, SpecialTokens::AsWritten)?);
    tokens.extend(request.eos_token_ids.first());
    if tokens.len() > context {
        return Err(Failure::new(Kind::Usage, format!("takes {} tokens, and {context} is the most", tokens.len())));
    }
    // The answer goes on where the question ends.
    let media = request.media.map(|media| {
        let mut positions = media.positions.clone();
        let last = positions.last().map_or(-1.0, |last| last.time);
        positions.extend((1..=tokens.len() - answer).map(|i| Position::all(last + i as f32)));
        Arc::new(MediaPrompt { positions, runs: media.runs.clone(), media: media.media.clone() })
    });
    Ok(ProbeTokens { tokens, media, answer: Some(answer) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_set_has_domains_enough_and_a_hundred_probes_of_each() {
        let set = shipped().set;
        assert!(set.domains().len() >= 8);
        for (domain, probes) in set.domains() {
            assert_eq!(probes.len(), 100, "{domain}");
            assert!(probes.iter().all(|probe| probe.text().is_some_and(|text| text.len() < 1024)), "{domain}");
        }
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("probes");
        assert_eq!(read(&dir).expect("it is a set").set.hash(), set.hash());
        assert_eq!(shipped_as(set.hash()).map(|probes| probes.set.domains().len()), Some(9));
    }

    #[test]
    fn the_shipped_questions_are_those_of_their_files() {
        let omni = shipped_omni();
        assert_eq!(omni.set.hash().to_string(), OMNI_HASH, "a change of a byte makes another set");
        assert_eq!(omni.set.domains().len(), 16);
        assert!(omni.set.domains().values().all(|probes| probes.len() == 100));
        let read = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("probes/omni")).expect("it is a set");
        for (domain, probes) in read.set.domains() {
            assert_eq!(omni.set.domains()[domain], *probes, "{domain}");
        }
        assert_eq!(read.set.domains().len(), 8);
        assert_eq!(shipped_as(omni.set.hash()).map(|probes| probes.questions.len()), Some(8));
    }
}
