//! A map of a model's experts: layers by experts, each with the domain that it serves. A letter says which, brightness how surely, and colour
//! both again, so that nothing is said by colour alone.

use std::fmt::Write;

use base::failure::{Failure, Kind};
use serde_json::Value;

/// Pixels of a cell, a letter's width and height, and how many pixels a dot of a letter has.
const CELL: usize = 16;
const GLYPH: (usize, usize) = (5, 7);
const DOT: usize = 2;
/// From a lift of 1 to this, cells get brighter.
const STRENGTH_MAX: f64 = 6.0;
/// Paul Tol's muted scheme, which people with any colour vision can tell apart; those beyond repeat.
const COLOURS: [[u8; 3]; 9] = [
    [51, 34, 136],
    [136, 204, 238],
    [68, 170, 153],
    [17, 119, 51],
    [153, 153, 51],
    [221, 204, 119],
    [204, 102, 119],
    [136, 34, 85],
    [170, 68, 153],
];

/// What an expert is best at.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Cell {
    pub(super) domain: usize,
    /// Lower bound of its lift.
    pub(super) strength: f64,
}

/// All experts of a model.
pub(super) struct Map {
    pub(super) names: Vec<String>,
    pub(super) per_layer: usize,
    /// Numbers of the layers with experts.
    pub(super) first_layers: Vec<u32>,
    /// In the order of layers and experts; nothing for those that serve all domains alike.
    pub(super) cells: Vec<Option<Cell>>,
}

impl Map {
    /// The map in an answer of `/api/experts/map`.
    pub(super) fn of(json: &Value) -> Option<Self> {
        let numbers = |name: &str| json[name].as_array();
        let names: Vec<_> = numbers("domains")?.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
        let cell = |(domain, lift): (&Value, &Value)| {
            let domain = usize::try_from(domain.as_i64()?).ok().filter(|&domain| domain < names.len())?;
            Some(Cell { domain, strength: lift.as_f64()? })
        };
        let cells: Vec<_> = numbers("domain")?.iter().zip(numbers("lift")?).map(cell).collect();
        let first_layers: Vec<_> = numbers("layers")?.iter().filter_map(|layer| Some(layer.as_u64()? as u32)).collect();
        let per_layer = json["experts_per_layer"].as_u64()? as usize;
        (cells.len() == per_layer * first_layers.len()).then_some(Self { names, per_layer, first_layers, cells })
    }

    /// A letter for each domain: its own first, or the next that no other has.
    fn letters(&self) -> Vec<char> {
        let mut taken = Vec::new();
        for name in &self.names {
            let own = name.to_ascii_uppercase();
            let letters = own.chars().filter(char::is_ascii_alphanumeric).chain('A'..='Z').chain('0'..='9');
            let mut free = letters.filter(|letter| !taken.contains(letter));
            let letter = free.next().expect("there are fewer domains than letters");
            taken.push(letter);
        }
        taken
    }

    /// For a terminal: a letter an expert, small where the lift is below 2, and what the letters mean.
    pub(super) fn text(&self) -> String {
        let letters = self.letters();
        let mut text = String::new();
        for (layer, cells) in self.first_layers.iter().zip(self.cells.chunks(self.per_layer.max(1))) {
            let line: String = cells
                .iter()
                .map(|cell| match cell {
                    Some(cell) if cell.strength >= 2.0 => letters[cell.domain],
                    Some(cell) => letters[cell.domain].to_ascii_lowercase(),
                    None => '.',
                })
                .collect();
            let _ = writeln!(text, "{layer:>3} {line}");
        }
        for (letter, (number, name)) in letters.iter().zip(self.names.iter().enumerate()) {
            let experts = self.cells.iter().flatten().filter(|cell| cell.domain == number).count();
            let _ = writeln!(text, "  {letter} {name}: {experts}");
        }
        let _ = writeln!(text, "  . none. A small letter: a lift of less than 2");
        text
    }

    /// A picture: a row a layer, a column an expert, and the legend below.
    pub(super) fn png(&self) -> Result<Vec<u8>, Failure> {
        let letters = self.letters();
        let longest = self.names.iter().map(String::len).max().unwrap_or(0);
        let width = (self.per_layer.max(longest + 8) + 4) * CELL;
        let mut picture = Picture::new(width, (self.first_layers.len() + self.names.len() + 3) * CELL);
        for (row, (layer, cells)) in self.first_layers.iter().zip(self.cells.chunks(self.per_layer.max(1))).enumerate() {
            picture.write(&format!("{layer:>2}"), (0, row), [90; 3]);
            for (column, cell) in cells.iter().enumerate() {
                match cell {
                    Some(cell) => picture.cell((column + 3, row), letters[cell.domain], shade(cell)),
                    None => picture.cell((column + 3, row), '.', [240; 3]),
                }
            }
        }
        for (number, (letter, name)) in letters.iter().zip(&self.names).enumerate() {
            let row = self.first_layers.len() + 1 + number;
            picture.cell((3, row), *letter, shade(&Cell { domain: number, strength: STRENGTH_MAX }));
            let experts = self.cells.iter().flatten().filter(|cell| cell.domain == number).count();
            picture.write(&format!("{} {experts}", name.to_ascii_uppercase().replace('_', " ")), (5, row), [40; 3]);
        }
        picture.encode()
    }
}

/// A domain's colour, the fainter the less sure it is.
fn shade(cell: &Cell) -> [u8; 3] {
    let full = ((cell.strength - 1.0) / (STRENGTH_MAX - 1.0)).clamp(0.15, 1.0);
    COLOURS[cell.domain % COLOURS.len()].map(|part| (255.0 - (255.0 - f64::from(part)) * full) as u8)
}

/// Pixels, RGB.
struct Picture {
    width: usize,
    pixels: Vec<u8>,
}

impl Picture {
    fn new(width: usize, height: usize) -> Self {
        Self { width, pixels: vec![255; width * height * 3] }
    }

    fn dot(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        let at = (y * self.width + x) * 3;
        if x < self.width && at + 3 <= self.pixels.len() {
            self.pixels[at..at + 3].copy_from_slice(&colour);
        }
    }

    fn cell(&mut self, (column, row): (usize, usize), letter: char, colour: [u8; 3]) {
        for y in 1..CELL {
            for x in 1..CELL {
                self.dot(column * CELL + x, row * CELL + y, colour);
            }
        }
        let brightness: u32 = colour.iter().zip([299, 587, 114]).map(|(part, weight)| u32::from(*part) * weight).sum();
        self.glyph(letter, (column * CELL + 3, row * CELL + 1), if brightness < 140_000 { [255; 3] } else { [0; 3] });
    }

    fn write(&mut self, text: &str, (column, row): (usize, usize), colour: [u8; 3]) {
        for (number, letter) in text.chars().enumerate() {
            self.glyph(letter, (column * CELL + number * (GLYPH.0 + 1) * DOT, row * CELL + 1), colour);
        }
    }

    fn glyph(&mut self, letter: char, (left, top): (usize, usize), colour: [u8; 3]) {
        for (y, line) in glyph(letter).iter().enumerate() {
            for x in (0..GLYPH.0).filter(|x| line >> (GLYPH.0 - 1 - x) & 1 == 1) {
                for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    self.dot(left + x * DOT + i, top + y * DOT + j, colour);
                }
            }
        }
    }

    fn encode(&self) -> Result<Vec<u8>, Failure> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, (self.pixels.len() / 3 / self.width) as u32);
        encoder.set_color(png::ColorType::Rgb);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&self.pixels));
        written.map_err(|error| Failure::new(Kind::Other, format!("cannot make the picture: {error}")))?;
        Ok(file)
    }
}

/// A letter in 5 × 7 dots, a number a line.
fn glyph(letter: char) -> [u8; GLYPH.1] {
    match letter {
        'A' => [14, 17, 17, 31, 17, 17, 17],
        'B' => [30, 17, 17, 30, 17, 17, 30],
        'C' => [14, 17, 16, 16, 16, 17, 14],
        'D' => [30, 17, 17, 17, 17, 17, 30],
        'E' => [31, 16, 16, 30, 16, 16, 31],
        'F' => [31, 16, 16, 30, 16, 16, 16],
        'G' => [14, 17, 16, 23, 17, 17, 15],
        'H' => [17, 17, 17, 31, 17, 17, 17],
        'I' => [14, 4, 4, 4, 4, 4, 14],
        'J' => [7, 2, 2, 2, 2, 18, 12],
        'K' => [17, 18, 20, 24, 20, 18, 17],
        'L' => [16, 16, 16, 16, 16, 16, 31],
        'M' => [17, 27, 21, 21, 17, 17, 17],
        'N' => [17, 25, 21, 19, 17, 17, 17],
        'O' => [14, 17, 17, 17, 17, 17, 14],
        'P' => [30, 17, 17, 30, 16, 16, 16],
        'Q' => [14, 17, 17, 17, 21, 18, 13],
        'R' => [30, 17, 17, 30, 20, 18, 17],
        'S' => [15, 16, 16, 14, 1, 1, 30],
        'T' => [31, 4, 4, 4, 4, 4, 4],
        'U' => [17, 17, 17, 17, 17, 17, 14],
        'V' => [17, 17, 17, 17, 17, 10, 4],
        'W' => [17, 17, 17, 21, 21, 27, 17],
        'X' => [17, 17, 10, 4, 10, 17, 17],
        'Y' => [17, 17, 10, 4, 4, 4, 4],
        'Z' => [31, 1, 2, 4, 8, 16, 31],
        '0' => [14, 17, 19, 21, 25, 17, 14],
        '1' => [4, 12, 4, 4, 4, 4, 14],
        '2' => [14, 17, 1, 6, 8, 16, 31],
        '3' => [14, 17, 1, 6, 1, 17, 14],
        '4' => [2, 6, 10, 18, 31, 2, 2],
        '5' => [31, 16, 30, 1, 1, 17, 14],
        '6' => [14, 16, 16, 30, 17, 17, 14],
        '7' => [31, 1, 2, 4, 4, 4, 4],
        '8' => [14, 17, 17, 14, 17, 17, 14],
        '9' => [14, 17, 17, 15, 1, 1, 14],
        '.' => [0, 0, 0, 0, 0, 0, 4],
        _ => [0; GLYPH.1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_told_apart_and_each_expert_has_its_place() {
        let names = ["poetry", "prose", "python"].map(str::to_owned).to_vec();
        let cell = |domain, strength| Some(Cell { domain, strength });
        let map =
            Map { names, per_layer: 3, first_layers: vec![0, 2], cells: vec![cell(0, 3.0), None, cell(1, 1.5), cell(2, 2.0), None, None] };
        assert_eq!(map.letters(), ['P', 'R', 'Y']);
        assert!(map.text().starts_with("  0 P.r\n  2 Y..\n  P poetry: 1\n"), "{}", map.text());
        let png = map.png().expect("a picture");
        assert!(png.starts_with(b"\x89PNG"));
    }
}
