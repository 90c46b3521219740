//! Charts as SVG: lines with their intervals, bars, and maps of cells. The page and the pictures differ by their colours alone.

use std::fmt::Write as _;

use super::statistics::{Figure, short};

/// Where a chart is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// In a page, whose own colours follow light and dark.
    Page,
    /// As a picture, on white.
    Picture,
}

/// Colours of series that people who see red and green alike can tell apart (Okabe and Ito 2008), in order.
const SERIES: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#6b6b6b"];
const WIDTH: f64 = 720.0;
const LINE: f64 = 16.0;
/// Room for the numbers of the upright axis, and for what stands below.
const LEFT: f64 = 64.0;
const BELOW: f64 = 44.0;

/// Points with intervals that belong together.
pub(super) struct Series {
    pub(super) name: String,
    /// Place along the axis, and what was measured there.
    pub(super) points: Vec<(f64, Figure)>,
}

/// A chart under way.
struct Drawing {
    shown: Shown,
    body: String,
    height: f64,
}

impl Drawing {
    fn new(shown: Shown, height: f64) -> Self {
        Self { shown, body: String::new(), height }
    }

    fn ink(&self) -> &'static str {
        if self.shown == Shown::Page { "var(--ink)" } else { "#1c1c1c" }
    }

    fn faint(&self) -> &'static str {
        if self.shown == Shown::Page { "var(--line)" } else { "#d0d0d0" }
    }

    fn text(&mut self, (x, y): (f64, f64), anchor: &str, text: &str) {
        let ink = self.ink();
        let _ = write!(self.body, "<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}' style='fill:{ink}'>{}</text>", escaped(text));
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str, width: f64) {
        let _ =
            write!(self.body, "<line x1='{x1:.1}' y1='{y1:.1}' x2='{x2:.1}' y2='{y2:.1}' style='stroke:{colour};stroke-width:{width}'/>");
    }

    fn rectangle(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), colour: &str, title: &str) {
        let title = if title.is_empty() { String::new() } else { format!("<title>{}</title>", escaped(title)) };
        let _ =
            write!(self.body, "<rect x='{x:.1}' y='{y:.1}' width='{width:.1}' height='{height:.1}' style='fill:{colour}'>{title}</rect>");
    }

    /// The names of the series, in lines; returns where they end.
    fn legend<'a>(&mut self, names: impl Iterator<Item = &'a str>) -> f64 {
        let (mut x, mut y) = (LEFT, LINE);
        for (name, colour) in names.zip(SERIES.iter().cycle()) {
            let width = 24.0 + 7.2 * name.chars().count() as f64;
            if x + width > WIDTH && x > LEFT {
                (x, y) = (LEFT, y + LINE);
            }
            self.rectangle((x, y - 10.0), (11.0, 11.0), colour, "");
            self.text((x + 15.0, y), "start", name);
            x += width;
        }
        y + LINE
    }

    /// The upright axis between `top` and `bottom`, in round steps; returns where a number lies on it.
    fn upright(&mut self, top: f64, bottom: f64, (least, most): (f64, f64), name: &str) -> impl Fn(f64) -> f64 + use<> {
        let step = round_step((most - least) / 4.0);
        let (first, last) = ((least / step).floor(), (most / step).ceil());
        let (least, most) = (first * step, last * step);
        let place = move |value: f64| bottom - (value.clamp(least, most) - least) / (most - least) * (bottom - top);
        for number in first as i64..=last as i64 {
            let value = number as f64 * step;
            let colour = if number == 0 { self.ink() } else { self.faint() };
            self.line((LEFT, place(value)), (WIDTH - 8.0, place(value)), colour, 1.0);
            self.text((LEFT - 6.0, place(value) + 4.0), "end", &short(value));
        }
        self.text((4.0, top - 8.0), "start", name);
        place
    }

    fn finish(self, title: &str) -> String {
        let Self { body, height, .. } = self;
        let size = format!("viewBox='0 0 {WIDTH} {height:.0}' width='{WIDTH}' height='{height:.0}'");
        let label = escaped(title);
        format!(
            "<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' aria-label='{label}' font-family='DejaVu Sans, sans-serif' font-size='12'>{body}</svg>"
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&#39;").replace('"', "&quot;")
}

/// The least of 1, 2 and 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10.0_f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|round| *round >= step * 0.999).unwrap_or(step)
}

/// What all numbers lie between, with 0 where they are of one sign.
fn range<'a>(figures: impl Iterator<Item = &'a Figure>) -> (f64, f64) {
    let (least, most) = figures.fold((0.0_f64, 0.0_f64), |(least, most), f| (least.min(f.low), most.max(f.high)));
    if most - least < 1e-12 { (0.0, 1.0) } else { (least, most) }
}

/// Lines over an axis of numbers; `below` says what those are.
pub(super) fn lines(shown: Shown, title: &str, upright: &str, below: &str, series: &[Series]) -> String {
    let mut drawing = Drawing::new(shown, 320.0);
    let top = drawing.legend(series.iter().map(|series| series.name.as_str())) + LINE;
    let bottom = drawing.height - BELOW;
    let y = drawing.upright(top, bottom, range(series.iter().flat_map(|series| series.points.iter().map(|(_, figure)| figure))), upright);
    let mut places: Vec<_> = series.iter().flat_map(|series| series.points.iter().map(|(at, _)| *at)).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let (Some(&first), Some(&last)) = (places.first(), places.last()) else { return drawing.finish(title) };
    let x = |at: f64| LEFT + 12.0 + (at - first) / (last - first).max(1e-12) * (WIDTH - LEFT - 32.0);
    let step = places.len().div_ceil(12);
    for &at in places.iter().step_by(step) {
        let text = if at.fract() == 0.0 { format!("{at:.0}") } else { short(at) };
        drawing.text((x(at), bottom + LINE), "middle", &text);
    }
    drawing.text((f64::midpoint(LEFT, WIDTH), drawing.height - 8.0), "middle", below);
    for (series, colour) in series.iter().zip(SERIES.iter().cycle()) {
        for pair in series.points.windows(2) {
            drawing.line((x(pair[0].0), y(pair[0].1.value)), (x(pair[1].0), y(pair[1].1.value)), colour, 2.0);
        }
        for (at, figure) in &series.points {
            drawing.line((x(*at), y(figure.low)), (x(*at), y(figure.high)), colour, 1.0);
            let title = format!("{}, {}: {}", series.name, short(*at), figure.text());
            drawing.rectangle((x(*at) - 2.5, y(figure.value) - 2.5), (5.0, 5.0), colour, &title);
        }
    }
    drawing.finish(title)
}

/// Bars side by side in groups, with their intervals.
pub(super) fn bars(shown: Shown, title: &str, upright: &str, groups: &[String], series: &[(String, Vec<Figure>)]) -> String {
    let slanted = groups.iter().map(String::len).max().unwrap_or(0) > 8;
    let below = if slanted { 110.0 } else { BELOW };
    let mut drawing = Drawing::new(shown, 300.0 + below);
    let top = drawing.legend(series.iter().map(|(name, _)| name.as_str())) + LINE;
    let bottom = drawing.height - below;
    let y = drawing.upright(top, bottom, range(series.iter().flat_map(|(_, figures)| figures)), upright);
    let group = (WIDTH - LEFT - 16.0) / groups.len().max(1) as f64;
    let bar = (group * 0.8 / series.len().max(1) as f64).min(40.0);
    for (number, name) in groups.iter().enumerate() {
        let left = LEFT + 8.0 + group * number as f64;
        for (at, ((series, figures), colour)) in series.iter().zip(SERIES.iter().cycle()).enumerate() {
            let Some(figure) = figures.get(number) else { continue };
            let (x, zero, value) = (left + bar * at as f64, y(0.0), y(figure.value));
            drawing.rectangle(
                (x, value.min(zero)),
                (bar - 1.0, (value - zero).abs().max(0.5)),
                colour,
                &format!("{name}, {series}: {}", figure.text()),
            );
            let (middle, ink) = (x + bar / 2.0, drawing.ink());
            drawing.line((middle, y(figure.low)), (middle, y(figure.high)), ink, 1.0);
        }
        let (x, y) = (left + bar * series.len() as f64 / 2.0, bottom + LINE);
        if slanted {
            let ink = drawing.ink();
            let _ = write!(
                drawing.body,
                "<text transform='translate({x:.1} {y:.1}) rotate(-40)' text-anchor='end' style='fill:{ink}'>{}</text>",
                escaped(name)
            );
        } else {
            drawing.text((x, y), "middle", name);
        }
    }
    drawing.finish(title)
}

/// A map of cells, each with a shade from 0 to 1 of one of the series' colours, and what it says when it is pointed at.
pub(super) struct Cell {
    pub(super) series: usize,
    pub(super) shade: f64,
    pub(super) title: String,
}

/// Rows of cells with their names; `names` are those of the colours.
pub(super) fn cells(shown: Shown, title: &str, names: &[String], rows: &[(String, Vec<Cell>)], columns: &[String]) -> String {
    let left = 12.0 + 7.2 * rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) as f64;
    let count = rows.iter().map(|(_, cells)| cells.len()).max().unwrap_or(1);
    let size = ((WIDTH - left - 8.0) / count as f64).min(40.0);
    let height = size.clamp(12.0, 24.0);
    let slanted = if columns.is_empty() { 0.0 } else { 100.0 };
    let mut drawing = Drawing::new(shown, 0.0);
    let top = if names.is_empty() { 8.0 } else { drawing.legend(names.iter().map(String::as_str)) };
    for (number, (name, row)) in rows.iter().enumerate() {
        let y = top + height * number as f64;
        drawing.text((left - 6.0, y + height / 2.0 + 4.0), "end", name);
        for (at, cell) in row.iter().enumerate() {
            let colour = SERIES[cell.series % SERIES.len()];
            let (x, faint) = (left + size * at as f64, drawing.faint());
            drawing.rectangle((x, y), (size - 1.0, height - 1.0), faint, "");
            let _ = write!(
                drawing.body,
                "<rect x='{x:.1}' y='{y:.1}' width='{:.1}' height='{:.1}' style='fill:{colour};fill-opacity:{:.2}'><title>{}</title></rect>",
                size - 1.0,
                height - 1.0,
                cell.shade.clamp(0.0, 1.0),
                escaped(&cell.title)
            );
        }
    }
    let bottom = top + height * rows.len() as f64;
    for (at, name) in columns.iter().enumerate() {
        let (x, y, ink) = (left + size * (at as f64 + 0.5), bottom + 12.0, drawing.ink());
        let _ = write!(
            drawing.body,
            "<text transform='translate({x:.1} {y:.1}) rotate(-40)' text-anchor='end' style='fill:{ink}'>{}</text>",
            escaped(name)
        );
    }
    drawing.height = bottom + slanted + 12.0;
    drawing.finish(title)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_go_in_round_steps() {
        let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found}, expected {expected}");
        [(0.3, 0.5), (0.11, 0.2), (1.0, 1.0), (42.0, 50.0), (0.007, 0.01)]
            .into_iter()
            .for_each(|(step, round)| near(round_step(step), round));
    }

    #[test]
    fn what_names_say_is_no_markup() {
        let figure = Figure { value: 1.0, low: 0.5, high: 1.5, items: 3 };
        let series = [Series { name: "<script>'\"&".to_owned(), points: vec![(0.0, figure), (1.0, figure)] }];
        let svg = lines(Shown::Page, "a 'title'", "up", "below", &series);
        assert!(!svg.contains("<script") && svg.contains("&lt;script&gt;&#39;&quot;&amp;") && svg.contains("var(--ink)"));
        assert!(!lines(Shown::Picture, "", "", "", &series).contains("var("));
    }
}
