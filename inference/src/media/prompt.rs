//! Prompts with pictures, videos and sounds: how many places each takes, and where each row stands.

use std::ops::Range;
use std::sync::Arc;

use protocol::ContentHash;
use protocol::profile::Modality;
use protocol::towers::{Audio, Vision};

use crate::mixer::rope::Position;
use crate::tower::vision::Patches;

/// A picture, a video or a sound in a prompt, as far as its places are concerned.
#[derive(Clone, PartialEq, Debug)]
pub enum Medium {
    /// Rows and columns of patches.
    Picture {
        /// Patches down and to the right.
        grid: [usize; 2],
    },
    /// Pairs of frames.
    Video {
        /// Pairs of frames; patches down and to the right.
        grid: [usize; 3],
        /// From one pair to the next.
        seconds_per_grid: f32,
        /// Rows of its own sound, if that is heard.
        sound_rows: Option<usize>,
    },
    /// Sound alone.
    Sound {
        /// Rows that it has.
        rows: usize,
    },
}

/// Which tower makes a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowSource {
    /// Eyes.
    Vision,
    /// Ears.
    Audio,
}

impl RowSource {
    /// What its rows stand for.
    pub fn modality(self) -> Modality {
        match self {
            Self::Vision => Modality::Image,
            Self::Audio => Modality::Audio,
        }
    }
}

/// A run of places in a prompt that rows of a medium take, in their order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which medium.
    pub medium: usize,
    /// Which tower.
    pub source: RowSource,
    /// Of that tower's rows.
    pub rows: Range<usize>,
    /// The first place.
    pub first: usize,
}

/// A prompt whose media have their places.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Layout {
    /// Token by token; a medium's tokens keep its places.
    pub tokens: Vec<u32>,
    /// Where each stands.
    pub positions: Vec<Position>,
    /// Where rows go, ascending.
    pub runs: Vec<Run>,
}

/// A medium on its way to its towers.
#[derive(Debug)]
pub struct PreparedMedium {
    /// Its places in a prompt.
    pub medium: Medium,
    /// Of its file, and of what was asked for of it.
    pub hash: ContentHash,
    /// What is seen.
    pub patches: Option<Patches>,
    /// The spectrum of what is heard, (bands, frames).
    pub spectrum: Option<Vec<f32>>,
    /// How long it lasts; 0 for a picture.
    pub seconds: f64,
}

/// A prompt with media: where everything stands, and what makes the rows.
#[derive(Debug)]
pub struct MediaPrompt {
    /// Where each row stands.
    pub positions: Vec<Position>,
    /// Where rows of media go, ascending.
    pub runs: Vec<Run>,
    /// The media.
    pub media: Vec<Arc<PreparedMedium>>,
}

impl MediaPrompt {
    /// How many of the first `same` rows, whose tokens are those of another prompt, stand for the same media there.
    pub fn same_rows(&self, other: Option<&Self>, same: usize) -> usize {
        let of = |prompt: &Self, run: &Run| (prompt.media[run.medium].hash, run.source, run.rows.clone(), run.first);
        let others = other.map(|other| &other.runs[..]).unwrap_or_default();
        let differs = self.runs.iter().enumerate().find(|(number, run)| {
            let there = others.get(*number).zip(other).map(|(run, other)| of(other, run));
            run.first < same && there != Some(of(self, run))
        });
        differs.map_or(same, |(_, run)| run.first)
    }
}

/// Why media have no places in a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The template says of more or fewer media than there are.
    #[error("the prompt has {places} places for {kind}s, and {media} came: the model's chat template does not take them")]
    Places {
        /// Of what.
        kind: &'static str,
        /// Places that the template made.
        places: usize,
        /// Media that came.
        media: usize,
    },
    /// The model has no such tower.
    #[error("this model takes no {0}s")]
    Tower(&'static str),
    /// A picture or clip so small that nothing is left of it.
    #[error("a {0} is too short to be heard or seen")]
    Empty(&'static str),
}

/// Pairs of frames of two seconds and the like become positions of this many a second.
struct Writer<'a> {
    layout: Layout,
    next: f32,
    per_second: f32,
    vision: Option<&'a Vision>,
    audio: Option<&'a Audio>,
}

impl Medium {
    /// Places that it takes in a prompt, besides marks.
    pub fn places(&self) -> usize {
        match *self {
            Self::Picture { grid: [height, width] } => height * width / 4,
            Self::Video { grid, sound_rows, .. } => grid.iter().product::<usize>() / 4 + sound_rows.unwrap_or(0),
            Self::Sound { rows } => rows,
        }
    }

    /// The word for it.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Picture { .. } => "picture",
            Self::Video { .. } => "video",
            Self::Sound { .. } => "sound",
        }
    }
}

/// Gives media their places: `tokens` is a prompt with one token for each, in their order.
pub fn lay_out(vision: Option<&Vision>, audio: Option<&Audio>, tokens: &[u32], media: &[Medium]) -> Result<Layout, LayoutError> {
    let kind_of = |token: u32| match (vision, audio) {
        (Some(vision), _) if token == vision.image_token => Some("picture"),
        (Some(vision), _) if token == vision.video_token => Some("video"),
        (_, Some(audio)) if token == audio.token => Some("sound"),
        _ => None,
    };
    for medium in media {
        let has = match medium {
            Medium::Sound { .. } => audio.is_some(),
            Medium::Video { sound_rows: Some(_), .. } => vision.is_some() && audio.is_some(),
            _ => vision.is_some(),
        };
        if !has {
            return Err(LayoutError::Tower(medium.kind()));
        }
        let empty = match medium {
            Medium::Sound { rows } => *rows == 0,
            Medium::Picture { grid } => grid.contains(&0),
            Medium::Video { grid, sound_rows, .. } => grid.contains(&0) || *sound_rows == Some(0),
        };
        if empty {
            return Err(LayoutError::Empty(medium.kind()));
        }
    }
    for kind in ["picture", "video", "sound"] {
        let places = tokens.iter().filter(|&&token| kind_of(token) == Some(kind)).count();
        let media = media.iter().filter(|medium| medium.kind() == kind).count();
        if places != media {
            return Err(LayoutError::Places { kind, places, media });
        }
    }
    let per_second = vision.map_or(0.0, |vision| vision.positions_per_second as f32);
    let mut writer = Writer { layout: Layout::default(), next: 0.0, per_second, vision, audio };
    // Media are told apart by kind: the first picture's place is the first place of a picture.
    let mut of_kind: [std::vec::IntoIter<usize>; 3] = ["picture", "video", "sound"].map(|kind| {
        let numbers: Vec<_> = (0..media.len()).filter(|&number| media[number].kind() == kind).collect();
        numbers.into_iter()
    });
    let mut at = 0;
    while let Some(&token) = tokens.get(at) {
        let number = match kind_of(token) {
            None => {
                writer.text(token);
                at += 1;
                continue;
            }
            Some("picture") => of_kind[0].next(),
            Some("video") => of_kind[1].next(),
            Some(_) => of_kind[2].next(),
        };
        let number = number.expect("places and media are as many");
        writer.medium(number, &media[number]);
        at += 1;
    }
    Ok(writer.layout)
}

impl Writer<'_> {
    fn text(&mut self, token: u32) {
        self.layout.tokens.push(token);
        self.layout.positions.push(Position::all(self.next));
        self.next += 1.0;
    }

    fn row(&mut self, token: u32, position: Position, (medium, source, row): (usize, RowSource, usize)) {
        let first = self.layout.tokens.len();
        self.layout.tokens.push(token);
        self.layout.positions.push(position);
        match self.layout.runs.last_mut() {
            Some(run) if (run.medium, run.source, run.rows.end) == (medium, source, row) && run.first + run.rows.len() == first => {
                run.rows.end += 1;
            }
            _ => self.layout.runs.push(Run { medium, source, rows: row..row + 1, first }),
        }
    }

    fn medium(&mut self, number: usize, medium: &Medium) {
        match *medium {
            Medium::Sound { rows } => {
                let token = self.audio.expect("checked above").token;
                for row in 0..rows {
                    self.row(token, Position::all(self.next), (number, RowSource::Audio, row));
                    self.next += 1.0;
                }
            }
            Medium::Picture { grid: [height, width] } => {
                let token = self.vision.expect("checked above").image_token;
                let seen = seen(self.next, [1, height, width], |_| 0.0);
                let mut farthest = self.next;
                for (row, position) in seen.enumerate() {
                    farthest = farthest.max(position.farthest());
                    self.row(token, position, (number, RowSource::Vision, row));
                }
                self.next = farthest + 1.0;
            }
            Medium::Video { grid, seconds_per_grid, sound_rows } => {
                let per_second = self.per_second;
                let time = move |pair: usize| pair as f32 * seconds_per_grid * per_second;
                match sound_rows {
                    None => {
                        let token = self.vision.expect("checked above").video_token;
                        let mut farthest = self.next;
                        for (row, position) in seen(self.next, grid, time).enumerate() {
                            farthest = farthest.max(position.farthest());
                            self.row(token, position, (number, RowSource::Vision, row));
                        }
                        self.next = farthest + 1.0;
                    }
                    Some(rows) => self.video_with_sound(number, grid, time, rows),
                }
            }
        }
    }

    /// What is seen and what is heard, merged by time. What follows stands behind the last of them, which need not be the farthest.
    fn video_with_sound(&mut self, number: usize, grid: [usize; 3], time: impl Fn(usize) -> f32, rows: usize) {
        let (vision, audio) = (self.vision.expect("checked above"), self.audio.expect("checked above"));
        self.text(audio.start_token);
        // The mark of a video's beginning has its place already; both begin where the next token would be.
        let start = self.next;
        let frame = grid[1] * grid[2] / 4;
        let (mut pictures, mut heard) = (seen(start, grid, &time).enumerate().peekable(), 0);
        let mut last = start;
        loop {
            let picture_first = match pictures.peek() {
                Some((row, _)) => heard == rows || time(row / frame) <= heard as f32,
                None if heard == rows => break,
                None => false,
            };
            if picture_first {
                let (row, position) = pictures.next().expect("it was looked at");
                self.row(vision.video_token, position, (number, RowSource::Vision, row));
                last = position.farthest();
            } else {
                last = start + heard as f32;
                self.row(audio.token, Position::all(last), (number, RowSource::Audio, heard));
                heard += 1;
            }
        }
        self.next = last + 1.0;
        self.text(audio.end_token);
    }
}

/// Positions of merged patches, frame by frame, row by row.
fn seen(start: f32, [pairs, height, width]: [usize; 3], time: impl Fn(usize) -> f32) -> impl Iterator<Item = Position> {
    let (height, width) = (height / 2, width / 2);
    (0..pairs * height * width).map(move |i| {
        let (pair, row, column) = (i / (height * width), i / width % height, i % width);
        Position { time: start + time(pair), height: start + row as f32, width: start + column as f32 }
    })
}
