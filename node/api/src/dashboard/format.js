/** Puts numbers, sizes, times and ids into words. */

const plain = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const full = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 6 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const PLURALS = { answer: "answers", expert: "experts", peer: "peers", time: "times", token: "tokens", layer: "layers", thread: "threads" };

export const exact = (value) => full.format(value);
export const number = (value) => plain.format(value);
export const compact = (value) => short.format(value);
export const decimals = (value, digits) => (value === null ? "–" : value.toFixed(digits));
export const count = (value, noun) => `${number(value)} ${value === 1 ? noun : PLURALS[noun]}`;
/** A name as people write it: of a domain, or of a field of the API. */
export const name = (identifier) => identifier.replaceAll("_", " ");
export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

export function bytes(value) {
  const power = Math.min(Math.floor(Math.log2(Math.max(value, 1)) / 10), UNITS.length - 1);
  const scaled = value / 1024 ** power;
  return `${power === 0 || scaled >= 100 ? number(scaled) : scaled.toPrecision(3)} ${UNITS[power]}`;
}

export function percent(part, all) {
  if (all === 0) return "–";
  const share = (100 * part) / all;
  return `${share > 0 && share < 10 ? share.toFixed(1) : share.toFixed(0)}%`;
}

export function milliseconds(value) {
  if (value >= 10_000) return `${(value / 1000).toFixed(0)} s`;
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`;
}

export function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86_400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

/** Peer ids all begin alike: their ends tell them apart. */
export const shortId = (id) => (id.length > 16 ? `${id.slice(0, 7)}…${id.slice(-6)}` : id);
