//! Prompt in, answer out, token by token.

use std::collections::VecDeque;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use crate::engine::{Engine, ForwardError, Overlay, Piece, Want};
use crate::expert_source::SourceError;
use crate::expert_use::ExpertUse;
use crate::media::prompt::{MediaPrompt, PreparedMedium, RowSource};
use crate::sampler::{NotFinite, Sampling, TokenLogprobs, sample};
use crate::session::Session;
use crate::tokenizer::{TextStream, Tokenizer, TokenizerError};
use crate::tower::TowerRows;

/// What to answer and when to stop.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Tokens to answer, from the beginning of the sequence; those that the session has seen are not taken in again.
    pub prompt: Vec<u32>,
    /// What stands in place of some of them.
    pub media: Option<Arc<MediaPrompt>>,
    /// Tokens of answer at most.
    pub tokens_max: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer; they are not part of it.
    pub eos_token_ids: Vec<u32>,
    /// Texts that end the answer; they are not part of its text.
    pub stop_strings: Vec<String>,
    /// How many of the likeliest tokens are to be told with their probabilities, if any are.
    pub top_logprobs: Option<usize>,
}

/// Something that happened on the way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The prompt has been taken in; the experts that it took.
    Prefilled(ExpertUse),
    /// The answer has grown by a token, and its text by this; the experts that it has taken so far.
    Token(String, ExpertUse),
}

/// Why an answer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopReason {
    /// The model ended it.
    EndOfText,
    /// A stop string came.
    StopString,
    /// As many tokens as were asked for.
    TokensMax,
    /// The model's context is full.
    ContextFull,
    /// The caller broke off.
    Interrupted,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Generated {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Its text; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub stop_reason: StopReason,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Nothing to answer.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// No room for an answer.
    #[error("the prompt has {tokens} tokens, the model's context is {context}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that the model can take.
        context: usize,
    },
    /// The model could not take a token in.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The model's output is broken.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// Tokens that are no text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A tower was not to be had.
    #[error(transparent)]
    Tower(SourceError),
}

/// Where rows of pictures and sounds come from.
pub trait TowerSource {
    /// The rows that a tower makes of a medium.
    fn rows(&mut self, engine: &Engine, medium: &PreparedMedium, source: RowSource) -> Result<Arc<TowerRows>, SourceError>;
}

/// No towers, for prompts of text.
#[derive(Clone, Copy, Debug)]
pub struct NoTowers;

impl TowerSource for NoTowers {
    fn rows(&mut self, _: &Engine, _: &PreparedMedium, _: RowSource) -> Result<Arc<TowerRows>, SourceError> {
        Err(SourceError("no towers are at hand".into()))
    }
}

/// Takes in a whole prompt, in an empty session; `each` sees the logits behind each of its tokens.
pub fn read<E: From<GenerateError>>(
    engine: &mut Engine,
    towers: &mut dyn TowerSource,
    (prompt, media): (&[u32], Option<&Arc<MediaPrompt>>),
    mut each: impl FnMut(usize, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let request = GenerateRequest {
        prompt: prompt.to_vec(),
        media: media.cloned(),
        tokens_max: 0,
        sampling: Sampling::GREEDY,
        eos_token_ids: Vec::new(),
        stop_strings: Vec::new(),
        top_logprobs: None,
    };
    let mut sequence = Sequence::new(engine.session(), Answer::new(request, None));
    let mut first = 0;
    while first < prompt.len() {
        let rows = sequence.take_in_for(engine, towers, usize::MAX, Want::All)?;
        (0..rows).try_for_each(|row| each(first + row, engine.logits_of(row)))?;
        first += rows;
    }
    Ok(())
}

/// Answers `request` in `session`; `on_progress` may break off after any token. When it fails, the session is as it was before.
pub fn generate(
    engine: &mut Engine,
    towers: &mut dyn TowerSource,
    tokenizer: Option<&Arc<Tokenizer>>,
    session: &mut Session,
    request: &GenerateRequest,
    mut on_progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Generated, GenerateError> {
    if request.prompt.len() <= session.tokens() {
        return Err(GenerateError::EmptyPrompt);
    }
    request.check(engine.context())?;
    let start = session.tokens();
    let own = std::mem::replace(session, engine.session());
    let mut sequence = Sequence::new(own, Answer::new(request.clone(), tokenizer));
    let ended = run(engine, towers, &mut sequence, &mut on_progress);
    *session = sequence.session;
    match ended {
        Ok(reason) => Ok(sequence.answer.into_generated(reason)),
        Err(error) => {
            session.rewind(start);
            Err(error)
        }
    }
}

/// Takes a sequence to its end.
fn run(
    engine: &mut Engine,
    towers: &mut dyn TowerSource,
    sequence: &mut Sequence,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<StopReason, GenerateError> {
    while sequence.wants_prompt() {
        sequence.take_in(engine, towers, usize::MAX)?;
    }
    let mut go_on = on_progress(Progress::Prefilled(engine.experts().usage()));
    loop {
        if go_on.is_break() {
            let rest = sequence.answer.break_off()?;
            if !rest.is_empty() {
                let _ = on_progress(Progress::Token(rest, engine.experts().usage()));
            }
            return Ok(StopReason::Interrupted);
        }
        let Step { token, text, ended, .. } = sequence.advance(engine, 0)?;
        if token.is_some() || !text.is_empty() {
            go_on = on_progress(Progress::Token(text, engine.experts().usage()));
        }
        if let Some(reason) = ended {
            return Ok(reason);
        }
        if go_on.is_continue() {
            decode(engine, &mut [sequence])?;
        }
    }
}

/// A prompt that is taken in piece by piece, and the answer that grows behind it: what everybody drives who generates.
#[derive(Debug)]
pub struct Sequence {
    /// What has been taken in.
    pub session: Session,
    /// What has come of it.
    pub answer: Answer,
    /// The token that is to be taken in next.
    pending: Option<u32>,
    /// Whether the prompt has been taken in.
    is_prefilled: bool,
    /// By medium and tower, once they are needed.
    rows: Vec<((usize, RowSource), Arc<TowerRows>)>,
}

impl Sequence {
    /// A sequence with as much of the prompt in `session` as it has.
    pub fn new(session: Session, answer: Answer) -> Self {
        Self { session, answer, pending: None, is_prefilled: false, rows: Vec::new() }
    }

    /// Whether some of the prompt is still to be taken in.
    pub fn wants_prompt(&self) -> bool {
        !self.is_prefilled
    }

    /// Whether a token of the answer is to be taken in.
    pub fn wants_token(&self) -> bool {
        self.pending.is_some()
    }

    /// Begins anew, with an empty session and answer.
    pub fn begin_again(&mut self, answer: Answer) {
        self.session.rewind(0);
        (self.answer, self.pending, self.is_prefilled) = (answer, None, false);
    }

    /// Takes in the next piece of the prompt, `most` rows at most; returns how many. After the last piece the logits are there.
    pub fn take_in(&mut self, engine: &mut Engine, towers: &mut dyn TowerSource, most: usize) -> Result<usize, GenerateError> {
        self.take_in_for(engine, towers, most, Want::Last)
    }

    /// The same for what every piece is [wanted](Want) for; logits of the last row come of the last piece alone.
    pub fn take_in_for(
        &mut self,
        engine: &mut Engine,
        towers: &mut dyn TowerSource,
        most: usize,
        want: Want,
    ) -> Result<usize, GenerateError> {
        let Self { session, answer, rows, .. } = self;
        let GenerateRequest { prompt, media, .. } = &answer.request;
        let first = session.tokens();
        let end = prompt.len().min(first.saturating_add(most.min(engine.rows_max())));
        let want = if want == Want::Last && end < prompt.len() { Want::Nothing } else { want };
        let mut runs = Vec::new();
        for run in media.iter().flat_map(|media| &media.runs) {
            let here = run.first.max(first)..(run.first + run.rows.len()).min(end);
            if here.is_empty() {
                continue;
            }
            let key = (run.medium, run.source);
            let made = if let Some((_, made)) = rows.iter().find(|(known, _)| *known == key) {
                Arc::clone(made)
            } else {
                let medium = &media.as_ref().expect("runs are of media").media[run.medium];
                let made = towers.rows(engine, medium, run.source).map_err(GenerateError::Tower)?;
                rows.push((key, Arc::clone(&made)));
                made
            };
            let start = run.rows.start + here.start - run.first;
            runs.push((run.source.modality(), here.start - first, made, start..start + here.len()));
        }
        let width = engine.model().decoder().hidden_size as usize;
        let numbers = |rows: &Range<usize>| rows.start * width..rows.end * width;
        let deepstack: Vec<Vec<&[f32]>> =
            runs.iter().map(|(_, _, made, rows)| made.deepstack.iter().map(|added| &added[numbers(rows)]).collect()).collect();
        let overlays: Vec<_> = runs
            .iter()
            .zip(&deepstack)
            .map(|((modality, first, made, rows), deepstack)| Overlay {
                modality: *modality,
                first: *first,
                rows: &made.rows[numbers(rows)],
                deepstack,
            })
            .collect();
        let mut piece = Piece::tokens(session, &prompt[first..end]);
        piece.positions = media.as_ref().map(|media| &media.positions[first..end]);
        piece.overlays = &overlays;
        let layers = engine.all_layers();
        engine.pass(&mut [piece], layers, want)?;
        self.is_prefilled = end == prompt.len();
        if self.is_prefilled {
            self.rows.clear(); // keys and values have taken them in
        }
        Ok(end - first)
    }

    /// Grows the answer by the logits of the n-th row of the last pass.
    pub fn advance(&mut self, engine: &mut Engine, number: usize) -> Result<Step, GenerateError> {
        let room = engine.context() - self.session.tokens();
        let step = self.answer.step(engine.logits(number), room)?;
        self.pending = step.token.filter(|_| step.ended.is_none());
        Ok(step)
    }
}

/// Takes in the next token of each answer, in one pass: the logits are there in the order of the sequences.
///
/// # Panics
/// When a sequence has no token to take in.
pub fn decode(engine: &mut Engine, sequences: &mut [&mut Sequence]) -> Result<(), ForwardError> {
    let tokens: Vec<_> = sequences.iter().map(|sequence| [sequence.pending.expect("it has a token to take in")]).collect();
    let mut pieces: Vec<_> =
        sequences.iter_mut().zip(&tokens).map(|(sequence, token)| Piece::tokens(&mut sequence.session, token)).collect();
    let layers = engine.all_layers();
    engine.pass(&mut pieces, layers, Want::Last)
}

impl GenerateRequest {
    /// Refuses a prompt that is empty, or that leaves no room for an answer in `context` tokens.
    pub fn check(&self, context: usize) -> Result<(), GenerateError> {
        match self.prompt.len() {
            0 => Err(GenerateError::EmptyPrompt),
            tokens if tokens >= context => Err(GenerateError::PromptTooLong { tokens, context }),
            _ => Ok(()),
        }
    }
}

/// An answer in the making. Whoever drives it computes the logits, for one sequence or for several together.
#[derive(Debug)]
pub struct Answer {
    request: GenerateRequest,
    /// Prompt and answer.
    seen: Vec<u32>,
    text: StopText,
    stream: Option<TextStream>,
    tokenizer: Option<Arc<Tokenizer>>,
}

/// What a token's logits came to.
#[derive(Clone, PartialEq, Debug)]
pub struct Step {
    /// The token by which the answer has grown: to be taken in next, unless the answer has ended. None when the model ended it.
    pub token: Option<u32>,
    /// Text that is certain now.
    pub text: String,
    /// How likely the token was, if that was asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Why the answer ends here, if it does.
    pub ended: Option<StopReason>,
}

impl Answer {
    /// An answer without a token. Without a tokenizer it has no text.
    pub fn new(request: GenerateRequest, tokenizer: Option<&Arc<Tokenizer>>) -> Self {
        let (seen, text) = (request.prompt.clone(), StopText::new(request.stop_strings.clone()));
        Self { request, seen, text, stream: tokenizer.map(Tokenizer::stream), tokenizer: tokenizer.cloned() }
    }

    /// What is to be answered.
    pub fn request(&self) -> &GenerateRequest {
        &self.request
    }

    /// Its tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.seen[self.request.prompt.len()..]
    }

    /// Prompt and answer so far.
    pub fn sequence(&self) -> &[u32] {
        &self.seen
    }

    /// Chooses the next token by the logits (vocab_size) after the last; there is room for `room` more tokens in the sequence.
    pub fn step(&mut self, logits: &mut [f32], room: usize) -> Result<Step, GenerateError> {
        if self.tokens().len() >= self.request.tokens_max {
            return self.end(None, String::new(), None, StopReason::TokensMax);
        }
        let requested = self.request.top_logprobs;
        let unchanged = requested.map(|_| logits.to_vec()); // the sampler's penalties change them
        let token = sample(&self.request.sampling, logits, &self.seen)?;
        if self.request.eos_token_ids.contains(&token) {
            return self.end(None, String::new(), None, StopReason::EndOfText);
        }
        let logprobs = requested.zip(unchanged).map(|(top, logits)| TokenLogprobs::of(&logits, token, top));
        self.seen.push(token);
        let (text, stopped) = match &mut self.stream {
            Some(stream) => {
                let text = stream.push(token)?;
                self.text.push(&text, self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.special_text(token)))
            }
            None => (String::new(), false),
        };
        if stopped {
            return Ok(Step { token: Some(token), text, logprobs, ended: Some(StopReason::StopString) });
        }
        if self.tokens().len() >= self.request.tokens_max {
            return self.end(Some(token), text, logprobs, StopReason::TokensMax);
        }
        if room == 0 {
            return self.end(Some(token), text, logprobs, StopReason::ContextFull);
        }
        Ok(Step { token: Some(token), text, logprobs, ended: None })
    }

    /// Shows what was held back; that may still turn out to be a stop string.
    fn end(
        &mut self,
        token: Option<u32>,
        mut text: String,
        logprobs: Option<TokenLogprobs>,
        reason: StopReason,
    ) -> Result<Step, GenerateError> {
        let (rest, stopped) = self.rest()?;
        text.push_str(&rest);
        Ok(Step { token, text, logprobs, ended: Some(if stopped { StopReason::StopString } else { reason }) })
    }

    fn rest(&mut self) -> Result<(String, bool), GenerateError> {
        let (mut rest, stopped) = match self.stream.take() {
            Some(stream) => self.text.push(&stream.finish()?, None),
            None => (String::new(), false),
        };
        if !stopped {
            rest.push_str(&self.text.release_all());
        }
        Ok((rest, stopped))
    }

    /// Ends the answer where it is; returns the text that was held back.
    pub fn break_off(&mut self) -> Result<String, GenerateError> {
        self.rest().map(|(rest, _)| rest)
    }

    /// The answer, with the reason why it ended.
    pub fn into_generated(self, stop_reason: StopReason) -> Generated {
        Generated { tokens: self.tokens().to_vec(), text: self.text.shown, stop_reason }
    }
}

/// Text with its end held back while it might still become a stop string. Special tokens are no part of the text, but stop strings may spell them.
#[derive(Debug)]
struct StopText {
    stops: Vec<String>,
    shown: String,
    /// With special tokens as they are spelled.
    held: String,
    /// Where those stand in it.
    hidden: VecDeque<Range<usize>>,
}

impl StopText {
    fn new(stops: Vec<String>) -> Self {
        Self { stops, shown: String::new(), held: String::new(), hidden: VecDeque::new() }
    }

    /// Adds text, and behind it a special token; returns what may be shown, and whether a stop string has come.
    fn push(&mut self, text: &str, special: Option<&str>) -> (String, bool) {
        self.held.push_str(text);
        if let Some(special) = special.filter(|_| !self.stops.is_empty()) {
            let start = self.held.len();
            self.held.push_str(special);
            self.hidden.push_back(start..self.held.len());
        }
        let found = self.stops.iter().filter_map(|stop| self.find(stop)).min();
        if let Some(at) = found {
            return (self.release(at), true);
        }
        let starts = |from: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[from..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(|&at| self.is_between(at) && starts(at)).unwrap_or(self.held.len());
        (self.release(keep), false)
    }

    /// Where a stop string begins, if it is there: it holds special tokens whole or not at all.
    fn find(&self, stop: &str) -> Option<usize> {
        self.held.match_indices(stop).map(|(at, _)| at).find(|&at| self.is_between(at) && self.is_between(at + stop.len()))
    }

    /// Whether a place is not within a special token.
    fn is_between(&self, at: usize) -> bool {
        !self.hidden.iter().any(|hidden| hidden.start < at && at < hidden.end)
    }

    /// Shows what is held back up to a place, without special tokens.
    fn release(&mut self, upto: usize) -> String {
        let rest = self.held.split_off(upto);
        let mut text = std::mem::replace(&mut self.held, rest);
        let gone = self.hidden.iter().take_while(|hidden| hidden.end <= upto).count();
        for hidden in self.hidden.drain(..gone).rev() {
            text.replace_range(hidden, "");
        }
        self.hidden.iter_mut().for_each(|hidden| *hidden = hidden.start - upto..hidden.end - upto);
        self.shown.push_str(&text);
        text
    }

    /// Shows all that is held back.
    fn release_all(&mut self) -> String {
        self.release(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let stops = ["\nUSER:".to_owned(), "END".to_owned()];
        let mut text = StopText::new(stops.to_vec());
        assert_eq!(text.push("one\n", None), ("one".into(), false));
        assert_eq!(text.push("two\nUS", None), ("\ntwo".into(), false));
        assert_eq!(text.push("é E", None), ("\nUSé ".into(), false));
        assert_eq!(text.push("N", None), (String::new(), false));
        assert_eq!(text.push("Dure", None), (String::new(), true));
        assert_eq!(text.shown, "one\ntwo\nUSé ");
    }

    #[test]
    fn what_was_held_back_is_not_lost() {
        let stops = ["END".to_owned()];
        let mut text = StopText::new(stops.to_vec());
        assert_eq!(text.push("the EN", None), ("the ".into(), false));
        assert_eq!((text.release_all(), text.shown), ("EN".into(), "the EN".into()));
    }

    #[test]
    fn special_tokens_stop_an_answer_and_are_no_part_of_it() {
        let stops = ["<|im_end|>".to_owned(), "</s>\nUSER".to_owned(), "im_s".to_owned()];
        let mut text = StopText::new(stops.to_vec());
        assert_eq!(text.push("one", Some("</s>")), ("one".into(), false));
        assert_eq!(text.push("\nUS", None), (String::new(), false));
        assert_eq!(text.push("A ", Some("<|im_start|>")), ("\nUSA ".into(), false), "no stop begins within a token");
        assert_eq!(text.push("two", Some("<|im_end|>")), ("two".into(), true));
        assert_eq!(text.shown, "one\nUSA two");
        let mut text = StopText::new(stops.to_vec());
        assert_eq!(text.push("a", Some("</s>")), ("a".into(), false));
        assert_eq!(text.push("\nUSER: b", None), (String::new(), true));
        let mut text = StopText::new(stops.to_vec());
        assert_eq!(text.push("", Some("</s>")), (String::new(), false));
        assert_eq!((text.release_all(), text.shown.as_str()), (String::new(), ""));
    }
}
