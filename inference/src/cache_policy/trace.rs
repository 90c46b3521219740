//! Which experts were used together, in memory and as text.

use std::fmt;

/// The most layers of a trace.
pub const LAYERS_MAX: u32 = 1024;
/// The most experts in a layer of a trace.
pub const EXPERTS_MAX: u32 = 4096;

/// Which experts were used together, in order of computation.
///
/// As text: a line `confrere-trace 1 LAYERS EXPERTS`, then for each step a line `LAYER EXPERT EXPERT …` with the experts
/// ascending. A decoded token makes one step in each layer; so does a prefill batch, of all its experts.
/// Stays on this node like [`ActivationLog`](crate::activation_log::ActivationLog): routing traces reveal text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trace {
    /// Layers of the model, of which some may not occur.
    pub layers: u32,
    /// Experts of each layer.
    pub experts: u32,
    steps: Vec<(u32, usize)>, // the layer, and where the step's experts end in `used`
    used: Vec<u16>,           // the experts of all steps
}

/// The experts that one layer used together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceStep<'a> {
    /// The layer.
    pub layer: u32,
    /// The experts, ascending.
    pub experts: &'a [u16],
}

impl Trace {
    /// A trace without steps of a model with these many layers and experts in a layer.
    pub fn new(layers: u32, experts: u32) -> Result<Self, TraceFault> {
        match (layers, experts) {
            (1..=LAYERS_MAX, 1..=EXPERTS_MAX) => Ok(Self { layers, experts, steps: Vec::new(), used: Vec::new() }),
            (_, 1..=EXPERTS_MAX) => Err(TraceFault::Layers(layers)),
            _ => Err(TraceFault::Experts(experts)),
        }
    }

    /// Adds a step. One that is refused leaves the trace as it was.
    pub fn push(&mut self, layer: u32, experts: &[u32]) -> Result<(), TraceFault> {
        if layer >= self.layers {
            return Err(TraceFault::Layer(layer));
        }
        if let Some(pair) = experts.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(TraceFault::NotAscending(pair[1]));
        }
        let last = *experts.last().ok_or(TraceFault::NoExperts)?;
        if last >= self.experts {
            return Err(TraceFault::Expert(last));
        }
        self.used.extend(experts.iter().map(|expert| *expert as u16));
        self.steps.push((layer, self.used.len()));
        Ok(())
    }

    /// Reads what its `Display` writes.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let mut lines = text.lines();
        let header = lines.next().unwrap_or_default();
        let mut trace = Self::parse_header(header).map_err(|fault| TraceError { line: 1, fault })?;
        for (text, line) in lines.zip(2..) {
            trace.parse_step(text).map_err(|fault| TraceError { line, fault })?;
        }
        Ok(trace)
    }

    /// The steps, in order.
    pub fn steps(&self) -> impl DoubleEndedIterator<Item = TraceStep<'_>> + ExactSizeIterator {
        (0..self.steps.len()).map(|index| {
            let (layer, end) = self.steps[index];
            let start = if index == 0 { 0 } else { self.steps[index - 1].1 };
            TraceStep { layer, experts: &self.used[start..end] }
        })
    }

    /// Slots of the model: layers × experts.
    pub fn slots(&self) -> usize {
        self.layers as usize * self.experts as usize
    }

    /// The slots of each step, ascending.
    pub(super) fn slots_of_steps(&self) -> impl DoubleEndedIterator<Item = Vec<usize>> + ExactSizeIterator {
        self.steps().map(|step| {
            let first = step.layer as usize * self.experts as usize;
            step.experts.iter().map(|expert| first + usize::from(*expert)).collect()
        })
    }

    fn parse_header(header: &str) -> Result<Self, TraceFault> {
        let words: Vec<&str> = header.split_ascii_whitespace().take(5).collect();
        let ["confrere-trace", "1", layers, experts] = words[..] else { return Err(TraceFault::Header) };
        Self::new(number(layers)?, number(experts)?)
    }

    fn parse_step(&mut self, line: &str) -> Result<(), TraceFault> {
        let numbers = line.split_ascii_whitespace().map(number).collect::<Result<Vec<u32>, _>>()?;
        let (layer, experts) = numbers.split_first().ok_or(TraceFault::NoExperts)?;
        self.push(*layer, experts)
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "confrere-trace 1 {} {}", self.layers, self.experts)?;
        for step in self.steps() {
            write!(f, "{}", step.layer)?;
            step.experts.iter().try_for_each(|expert| write!(f, " {expert}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

/// The number that a word of digits is; a sign is refused.
fn number(word: &str) -> Result<u32, TraceFault> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    word.parse().ok().filter(|_| digits).ok_or_else(|| TraceFault::Number(word.chars().take(20).collect()))
}

/// Text that is not a trace.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {fault}")]
pub struct TraceError {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub fault: TraceFault,
}

/// What is wrong with a trace or a step.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TraceFault {
    /// The first line is another one.
    #[error("not `confrere-trace 1 LAYERS EXPERTS`")]
    Header,
    /// So many layers are not possible.
    #[error("{0} layers: a trace has 1 to {max}", max = LAYERS_MAX)]
    Layers(u32),
    /// So many experts in a layer are not possible.
    #[error("{0} experts: a layer has 1 to {max}", max = EXPERTS_MAX)]
    Experts(u32),
    /// Something else stands where a number should; its beginning.
    #[error("{0:?} is not a whole number of 32 bits")]
    Number(String),
    /// A step without experts.
    #[error("a step without experts")]
    NoExperts,
    /// The model does not have this layer.
    #[error("there is no layer {0}; they count from 0")]
    Layer(u32),
    /// The layers do not have this expert.
    #[error("there is no expert {0}; they count from 0")]
    Expert(u32),
    /// An expert that is not above the one before it.
    #[error("expert {0} is not above the one before it")]
    NotAscending(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_reads_back_as_written() {
        let mut written = Trace::new(2, 4096).expect("within limits");
        written.push(0, &[0, 5, 4095]).expect("valid");
        written.push(1, &[7]).expect("valid");
        let text = "confrere-trace 1 2 4096\n0 0 5 4095\n1 7\n";
        assert_eq!(written.to_string(), text);
        assert_eq!(Trace::parse(text).as_ref(), Ok(&written));
        assert_eq!(Trace::parse(&text.replace('\n', "\r\n")), Ok(written));
        let empty = Trace::new(LAYERS_MAX, EXPERTS_MAX).expect("within limits");
        assert_eq!(Trace::parse(&empty.to_string()), Ok(empty));
    }

    #[test]
    fn trace_refuses_bad_lines_with_their_numbers() {
        let refused = |text: &str| Trace::parse(text).expect_err(text).to_string();
        for header in ["", "\n", "0 1 2", "confrere-trace 2 1 1", "confrere-trace 1 1", "confrere-trace 1 1 1 1", "confrere-trac 1 1 1"] {
            assert_eq!(refused(header), "line 1: not `confrere-trace 1 LAYERS EXPERTS`");
        }
        for (rest, fault) in [
            ("0 8", "line 1: 0 layers: a trace has 1 to 1024"),
            ("1025 8", "line 1: 1025 layers: a trace has 1 to 1024"),
            ("1 0", "line 1: 0 experts: a layer has 1 to 4096"),
            ("1 4097", "line 1: 4097 experts: a layer has 1 to 4096"),
            ("1 +8", "line 1: \"+8\" is not a whole number of 32 bits"),
            ("2 8\n0 1\n2 1", "line 3: there is no layer 2; they count from 0"),
            ("2 8\n0 7\n1 0\n0 1 8\n", "line 4: there is no expert 8; they count from 0"),
            ("2 8\n0 1 1", "line 2: expert 1 is not above the one before it"),
            ("2 8\n0 3 1 9", "line 2: expert 1 is not above the one before it"),
            ("2 8\n0", "line 2: a step without experts"),
            ("2 8\n0 1\n\n0 1", "line 3: a step without experts"),
            ("2 8\n0 -1", "line 2: \"-1\" is not a whole number of 32 bits"),
            ("2 8\n0 4294967296", "line 2: \"4294967296\" is not a whole number of 32 bits"),
            ("2 8\n0 ééééééééééééééééééééééé", "line 2: \"éééééééééééééééééééé\" is not a whole number of 32 bits"),
        ] {
            assert_eq!(refused(&format!("confrere-trace 1 {rest}")), fault);
        }
    }
}
