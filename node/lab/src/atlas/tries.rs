//! What becomes of a model's losses when some of its experts are left out: one change after another, on items that none of them was chosen by.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

use base::clock::check_interrupted;
use base::failure::{Failure, io_failure};
use base::output::count_bar;
use inference::activation_log::ActivationLog;
use inference::engine::LeftOut;
use inference::probe_tokens::losses;
use inference::profiler::Profiler;
use protocol::ExpertSlot;
use runtime::loading::Loaded;
use serde::{Deserialize, Serialize};

use super::statistics::{Figure, mean};

/// A change to a model.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// These experts' results are left out.
    LeftOut(Vec<LeftOut>),
    /// Results of less weight are left out, by modality.
    WeightMin([f32; 3]),
}

impl Change {
    /// Leaves experts out for all tokens.
    pub(super) fn without(slots: impl IntoIterator<Item = ExpertSlot>) -> Self {
        Self::LeftOut(slots.into_iter().map(LeftOut::from).collect())
    }
}

/// A change by name, which says all of it for one model and one seed.
#[derive(Clone, Debug)]
pub(super) struct Try {
    pub(super) name: String,
    pub(super) change: Change,
}

/// Losses of some items, in nats a token that is scored.
pub(super) type Losses = Vec<f64>;

/// What is measured, and on what.
pub(super) struct Bench<'a> {
    loaded: &'a mut Loaded,
    profiler: &'a Profiler,
    /// Domain and probe of each.
    items: Vec<(usize, usize)>,
    journal: Journal,
}

impl<'a> Bench<'a> {
    /// Goes on with the journal at `path` if it is `about` the same.
    pub(super) fn new(
        loaded: &'a mut Loaded,
        profiler: &'a Profiler,
        items: Vec<(usize, usize)>,
        path: &Path,
        about: &str,
    ) -> Result<Self, Failure> {
        Ok(Self { loaded, profiler, items, journal: Journal::open(path, about)? })
    }

    /// The losses of the model as it is, and by modality the weights that its tokens gave their experts, ascending.
    pub(super) fn unchanged(&mut self) -> Result<(Losses, [Vec<f32>; 3]), Failure> {
        let mut weights = [const { Vec::new() }; 3];
        let rows = self.items.iter().map(|&(domain, probe)| self.profiler.probes()[domain][probe].tokens.len()).max().unwrap_or(1);
        let before = self.loaded.engine.log.replace(ActivationLog::new(rows * self.loaded.engine.model().decoder().layers() as usize));
        let read = self.read(|loaded| {
            let log = loaded.engine.log.as_mut().expect("it was put there");
            for entry in log.entries() {
                weights[entry.modality as usize].extend(entry.choices.iter().map(|choice| choice.weight));
            }
            log.clear();
        });
        self.loaded.engine.log = before;
        weights.iter_mut().for_each(|weights| weights.sort_by(f32::total_cmp));
        Ok((read?, weights))
    }

    /// The losses with each change, by its name.
    pub(super) fn with_each(&mut self, tries: &[Try]) -> Result<BTreeMap<String, Losses>, Failure> {
        let bar = count_bar(tries.len() as u64, "leaving out", "changes");
        let mut found = BTreeMap::new();
        for Try { name, change } in tries {
            let losses = match self.journal.known.get(name) {
                Some(known) => known.clone(),
                None => self.with(change).and_then(|losses| self.journal.add(name, losses))?,
            };
            found.insert(name.clone(), losses);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(found)
    }

    fn with(&mut self, change: &Change) -> Result<Losses, Failure> {
        let engine = &mut self.loaded.engine;
        match change {
            Change::LeftOut(left_out) => engine.left_out.clone_from(left_out),
            Change::WeightMin(least) => engine.weight_min = *least,
        }
        let read = self.read(|_| {});
        let engine = &mut self.loaded.engine;
        engine.left_out.clear();
        engine.weight_min = [0.0; 3];
        read
    }

    /// Reads all items; `after` looks at the model behind each.
    fn read(&mut self, mut after: impl FnMut(&mut Loaded)) -> Result<Losses, Failure> {
        let mut all = Vec::with_capacity(self.items.len());
        for &(domain, probe) in &self.items {
            check_interrupted()?;
            let Loaded { engine, towers, .. } = &mut *self.loaded;
            let found = losses(engine, towers, &self.profiler.probes()[domain][probe])?;
            let sum: f64 = found.iter().map(|&loss| f64::from_bits(loss)).sum();
            all.push(sum / found.len().max(1) as f64);
            after(self.loaded);
        }
        Ok(all)
    }
}

/// For each of `domains`, the mean of its items' numbers with an interval.
pub(super) fn by_domain(items: &[(usize, usize)], numbers: &[f64], domains: usize, seed: u64) -> Vec<Figure> {
    let of = |wanted: usize| items.iter().zip(numbers).filter(move |((domain, _), _)| *domain == wanted).map(|(_, number)| *number);
    (0..domains).map(|domain| mean(&of(domain).collect::<Vec<_>>(), seed)).collect()
}

/// What has been measured already, a line each.
struct Journal {
    file: File,
    path: PathBuf,
    known: BTreeMap<String, Losses>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    About { about: String },
    Tried { name: String, losses: Losses },
}

impl Journal {
    /// Lines that were written in part, or are about something else, count for nothing.
    fn open(path: &Path, about: &str) -> Result<Self, Failure> {
        let failed = |action: &str, error: &std::io::Error| io_failure(action, path, error);
        let mut known = BTreeMap::new();
        let mut same = false;
        if let Ok(file) = File::open(path) {
            for (number, line) in BufReader::new(file).lines().enumerate() {
                let Ok(line) = serde_json::from_str(&line.map_err(|error| failed("read", &error))?) else { break };
                match line {
                    Line::About { about: its } => same = number == 0 && its == about,
                    Line::Tried { name, losses } => drop(known.insert(name, losses)),
                }
            }
        }
        if !same {
            known.clear();
        }
        // What is kept is written again: a line that was cut off must not go on.
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path).map_err(|error| failed("write", &error))?;
        let lines = std::iter::once(Line::About { about: about.to_owned() });
        let lines = lines.chain(known.iter().map(|(name, losses)| Line::Tried { name: name.clone(), losses: losses.clone() }));
        for line in lines {
            writeln!(file, "{}", serde_json::to_string(&line).expect("it is JSON")).map_err(|error| failed("write", &error))?;
        }
        Ok(Self { file, path: path.to_owned(), known })
    }

    fn add(&mut self, name: &str, losses: Losses) -> Result<Losses, Failure> {
        let line = serde_json::to_string(&Line::Tried { name: name.to_owned(), losses: losses.clone() }).expect("it is JSON");
        writeln!(self.file, "{line}").map_err(|error| io_failure("write", &self.path, &error))?;
        Ok(losses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_goes_on_where_it_was_cut_off_and_begins_anew_for_something_else() {
        let dir = std::env::temp_dir().join(format!("confrere-atlas-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let path = dir.join("tried.jsonl");
        let mut journal = Journal::open(&path, "a").expect("it opens");
        for name in ["x", "y"] {
            journal.add(name, vec![1.5, 0.1]).expect("written");
        }
        drop(journal);
        let length = std::fs::metadata(&path).expect("it is there").len();
        File::options().write(true).open(&path).expect("it opens").set_len(length - 3).expect("cut");
        let journal = Journal::open(&path, "a").expect("it opens");
        assert_eq!(journal.known, BTreeMap::from([("x".to_owned(), vec![1.5, 0.1])]));
        assert_eq!(std::fs::read_to_string(&path).expect("readable").lines().count(), 2);
        assert!(Journal::open(&path, "b").expect("it opens").known.is_empty());
        std::fs::remove_dir_all(&dir).expect("removable");
    }
}
