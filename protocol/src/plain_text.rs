//! Text from elsewhere as it may be shown to people: of bounded length, and without characters that a terminal would obey.

/// Most characters of a line.
pub const LINE_CHARS_MAX: usize = 200;
/// Most lines of one message.
pub const LINES_MAX: usize = 100;

/// Returns the first line's worth of `text`, at most [`LINE_CHARS_MAX`] characters; control characters are escaped, line ends among them.
pub fn plain_line(text: &str) -> String {
    let mut line = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == LINE_CHARS_MAX {
            line.push('…');
            break;
        }
        if is_obeyed(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Returns `text` line by line, each as [`plain_line`] has it, at most [`LINES_MAX`] of them and a count of the others.
pub fn plain_lines(text: &str) -> String {
    let mut lines = text.lines();
    let shown: Vec<_> = lines.by_ref().take(LINES_MAX).map(plain_line).collect();
    let more = lines.count();
    let more = (more > 0).then(|| format!("… and {more} more lines"));
    shown.into_iter().chain(more).collect::<Vec<_>>().join("\n")
}

/// Control characters, and those that turn the direction of writing around.
fn is_obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown_that_a_terminal_obeys() {
        assert_eq!(plain_line("a\u{1b}[2Jb\r\nc\u{202e}é汉"), "a\\u{1b}[2Jb\\r\\nc\\u{202e}é汉");
        assert_eq!(plain_lines("one\n\ttwo"), "one\n\\ttwo");
    }

    #[test]
    fn a_message_has_a_hundred_lines_of_two_hundred_characters() {
        let line = "é".repeat(LINE_CHARS_MAX);
        assert_eq!(plain_line(&line), line);
        assert_eq!(plain_line(&format!("{line}x")), format!("{line}…"));
        let lines = "x\n".repeat(LINES_MAX);
        assert_eq!(plain_lines(&lines).lines().count(), LINES_MAX);
        assert_eq!(plain_lines(&format!("{lines}y\nz")).lines().last(), Some("… and 2 more lines"));
    }
}
