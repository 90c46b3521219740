/** What the map of experts can show: for each view how a cell is painted, what its legend says, and the colours, read from the style sheet. */

import { compact, count, name, number } from "./format.js";

export const PLACES = ["nowhere", "at peers", "on disk", "in memory"];
/** Cells of at least so many CSS pixels have room for a letter, or a number. */
const LETTER_ROOM = 9;
const NUMBER_ROOM = 24;
/** From a lift of 1 to this, cells get stronger; the weakest leading domain is still seen. */
const LIFT_MAX = 6;
const FAINTEST = 0.22;
const STEPS = 64;

let colours;

/** Reads the colours of the scheme in force. */
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const read = (variable) => style.getPropertyValue(variable).trim();
  const list = (variable) => read(variable).split(/\s+/);
  colours = {
    ink: read("--ink"),
    muted: read("--muted"),
    page: read("--page"),
    empty: read("--cell"),
    glow: rgb(read("--glow")),
    places: ["--nowhere", "--peers", "--disk", "--memory"].map(read),
    domains: list("--domains").map((full) => ramp([read("--cell"), full])),
    magnitudes: ramp(list("--magnitudes")),
  };
  return colours;
}

export const VIEWS = {
  place: {
    paint(context, box, index, { places }) {
      paintPlace(context, box, places[index]);
    },
    key({ places }, index) {
      return places[index];
    },
    legend(map) {
      const counts = tally(map.places, (place) => place);
      return [3, 2, 1, 0].map((place) => ({ key: place, label: PLACES[place], count: counts.get(place) ?? 0, sample: { places: [place] } }));
    },
  },

  uses: {
    paint(context, box, index, { uses, usesMax }) {
      if (uses[index] === 0) return paintNothing(context, box);
      const colour = magnitude(uses[index], usesMax);
      fill(context, box, colour);
      if (box.size >= NUMBER_ROOM * box.scale) write(context, box, compact(uses[index]), colour, 0.34);
    },
    key({ uses }, index) {
      return decade(uses[index]);
    },
    legend({ uses, usesMax }) {
      const counts = tally(uses, decade);
      return Array.from({ length: Math.max(...counts.keys()) + 1 }, (_, key) => {
        const [least, most] = key === 0 ? [0, 0] : [10 ** (key - 1), 10 ** key - 1];
        const label = key === 0 ? "not used" : `${compact(least)} to ${compact(most)}`;
        return { key, label, count: counts.get(key) ?? 0, sample: { uses: [Math.min(usesMax, 3 * least)], usesMax } };
      });
    },
  },

  domain: {
    paint(context, box, index, { domain, lift, letters }) {
      const leading = domain[index];
      if (leading < 0) return paintNothing(context, box);
      const colour = colours.domains[leading % colours.domains.length][strength(lift[index])];
      fill(context, box, colour);
      if (box.size >= LETTER_ROOM * box.scale) write(context, box, letters[leading], colour, 0.72);
    },
    key({ domain }, index) {
      return domain[index];
    },
    legend({ domain, domains, letters }) {
      const counts = tally(domain, (leading) => leading);
      return [...domains.keys(), -1].map((key) => {
        const label = key < 0 ? "none leads" : name(domains[key]);
        return { key, label, count: counts.get(key) ?? 0, sample: { domain: [key], lift: [LIFT_MAX], letters } };
      });
    },
  },

  modality: {
    paint(context, box, index, { shares: { leading, share } }) {
      if (leading[index] < 0) return paintNothing(context, box);
      const { letter, colour } = MODALITIES[leading[index]];
      const shade = colours.domains[colour][Math.round((FAINTEST + (1 - FAINTEST) * share[index]) * (STEPS - 1))];
      fill(context, box, shade);
      if (box.size >= LETTER_ROOM * box.scale) write(context, box, letter, shade, 0.72);
    },
    key({ shares }, index) {
      return shares.leading[index];
    },
    legend({ shares, uses_by_modality: uses }) {
      const counts = tally(shares.leading, (leading) => leading);
      const known = [...MODALITIES.keys()].filter((index) => index === 0 || uses[MODALITIES[index].key]);
      return [...known, -1].map((key) => {
        const label = key < 0 ? "not used" : MODALITIES[key].label;
        return { key, label, count: counts.get(key) ?? 0, sample: { shares: { leading: [key], share: [1] } } };
      });
    },
  },
};

/** What tokens stand for, with the letter of each and its colour among those of domains. */
const MODALITIES = [
  { key: "text", label: "text", letter: "T", colour: 0 },
  { key: "image", label: "pictures", letter: "P", colour: 5 },
  { key: "audio", label: "sounds", letter: "S", colour: 2 },
];

/**
 * For each expert, the modality that used it more than the others for their numbers in its layer, and how much of the expert that makes up,
 * from 0 to 1; −1 where it was not used.
 */
export function sharesOf({ uses, uses_by_modality: { image, audio }, layers, perLayer }) {
  const media = [image, audio].map((counts) => counts ?? new Array(uses.length).fill(0));
  const counts = [uses.map((all, index) => all - media[0][index] - media[1][index]), ...media];
  const leading = new Array(uses.length).fill(-1);
  const share = new Array(uses.length).fill(0);
  for (let row = 0; row < layers.length; row++) {
    const here = [row * perLayer, (row + 1) * perLayer];
    const totals = counts.map((of) => of.slice(...here).reduce((sum, times) => sum + times, 0));
    for (let index = here[0]; index < here[1]; index++) {
      const shares = counts.map((of, modality) => (totals[modality] > 0 ? of[index] / totals[modality] : 0));
      const sum = shares.reduce((sum, one) => sum + one, 0);
      if (sum === 0) continue;
      leading[index] = shares.indexOf(Math.max(...shares));
      share[index] = shares[leading[index]] / sum;
    }
  }
  return { leading, share };
}

/** What is known of an expert, in a sentence. */
export function describe(map, index) {
  const [row, column] = [Math.floor(index / map.perLayer), index % map.perLayer];
  const holders = map.holders[index] ? `, ${count(map.holders[index], "peer")} with it` : "";
  const used = map.uses[index] ? `used ${count(map.uses[index], "time")}` : "not used";
  const media = MODALITIES.filter(({ key }) => map.uses_by_modality[key]?.[index]);
  const by = media.map(({ key, label }) => `, ${number(map.uses_by_modality[key][index])} by ${label}`).join("");
  const leading = map.domain[index];
  const good = leading < 0 ? "" : `; ${name(map.domains[leading])}, lift at least ${map.lift[index].toFixed(2)}`;
  return `Layer ${map.layers[row]}, expert ${column}: ${PLACES[map.places[index]]}${holders}; ${used}${by}${good}`;
}

/** A letter for each domain: its own first, or the next that no other has; as `experts map` gives them. */
export function lettersOf(domains) {
  const taken = [];
  for (const domain of domains) {
    const own = domain.toUpperCase().replace(/[^A-Z0-9]/g, "");
    taken.push([...own, ..."ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"].find((letter) => !taken.includes(letter)) ?? "?");
  }
  return taken;
}

/** The end of the scale: few enough of them that the map is seldom painted anew. */
export function ceiling(most) {
  const decade = 10 ** Math.floor(Math.log10(Math.max(most, 1)));
  return decade * [1, 2, 5, 10].find((factor) => factor * decade >= most);
}

/** Full, striped, hollow, a dot: told apart without colour, too. */
function paintPlace(context, box, place) {
  if (place === 0) return paintNothing(context, box);
  const { x, y, width, height, size, scale } = box;
  const line = Math.max(1, Math.round(size / 9));
  fill(context, box, colours.places[place]);
  context.fillStyle = colours.empty;
  if (place === 1) {
    context.fillRect(x + line, y + line, width - 2 * line, height - 2 * line);
  } else if (place === 2 && size >= LETTER_ROOM * scale) {
    const gap = Math.round((height - 2 * line) / 3);
    context.fillRect(x, y + gap, width, line);
    context.fillRect(x, y + height - gap - line, width, line);
  }
}

function paintNothing(context, box) {
  const { x, y, width, height, size } = box;
  const dot = Math.max(2, Math.round(size / 7));
  fill(context, box, colours.empty);
  context.fillStyle = colours.places[0];
  context.fillRect(x + Math.round((width - dot) / 2), y + Math.round((height - dot) / 2), dot, dot);
}

function fill(context, { x, y, width, height }, colour) {
  context.fillStyle = colour;
  context.fillRect(x, y, width, height);
}

function write(context, { x, y, width, height, size }, text, on, share) {
  context.font = `600 ${Math.round(size * share)}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = luminance(on) > 0.18 ? "#000" : "#fff";
  context.fillText(text, x + width / 2, y + height / 2 + size * 0.04);
}

function magnitude(value, most) {
  const share = most > 1 ? Math.log(value) / Math.log(most) : 1;
  return colours.magnitudes[Math.round(Math.min(share, 1) * (STEPS - 1))];
}

/** How far a lift is from the empty cell's colour to the domain's own. */
function strength(lift) {
  const share = FAINTEST + (1 - FAINTEST) * Math.max(0, (lift - 1) / (LIFT_MAX - 1));
  return Math.round(Math.min(share, 1) * (STEPS - 1));
}

/** 0 for what was never used, 1 for up to 9 times, 2 for up to 99 … */
const decade = (uses) => (uses === 0 ? 0 : Math.floor(Math.log10(uses)) + 1);

function tally(values, keyOf) {
  const counts = new Map();
  for (const value of values) counts.set(keyOf(value), (counts.get(keyOf(value)) ?? 0) + 1);
  return counts;
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const hex = (parts) => `#${parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("")}`;

function mix(from, to, share) {
  const ends = [rgb(from), rgb(to)];
  return hex(ends[0].map((part, index) => part + (ends[1][index] - part) * share));
}

/** Colours in even steps from the first stop through the others to the last. */
function ramp(stops) {
  return Array.from({ length: STEPS }, (_, step) => {
    const place = (step / (STEPS - 1)) * (stops.length - 1);
    const before = Math.min(Math.floor(place), stops.length - 2);
    return mix(stops[before], stops[before + 1], place - before);
  });
}

function luminance(colour) {
  const linear = rgb(colour).map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
