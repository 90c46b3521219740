/** The figures of what is under way: four tiles with the last minutes, and where experts were when they were needed. */

import { addTools } from "./chart_tools.js";
import { byId, element } from "./dom.js";
import { clock, compact, decimals, milliseconds, name, number, percent } from "./format.js";
import { WINDOW_MS, drawSparkline } from "./sparkline.js";

const HITS = [
  { key: "ram", label: "in memory" },
  { key: "disk", label: "on disk" },
  { key: "remote", label: "run at peers" },
  { key: "fetched", label: "fetched" },
];
/** What each tile says of the newest sample, and of those of the last minutes. */
const TILES = [
  {
    id: "tile-speed",
    title: "Tokens a second",
    value: (now) => decimals(now.tokens_per_second, 1),
    series: (sample) => sample.tokens_per_second,
    note: (values) => `peak ${decimals(Math.max(...values), 1)}`,
  },
  {
    id: "tile-first",
    title: "Time to first token",
    value: (now) => (now.time_to_first_token_ms === null ? "–" : milliseconds(now.time_to_first_token_ms)),
    series: (sample) => sample.time_to_first_token_ms,
    note: (values) => `peak ${milliseconds(Math.max(...values))}`,
  },
  {
    id: "tile-active",
    title: "Active requests",
    value: (now) => `${number(now.active)}, ${number(now.waiting)}`,
    series: (sample) => sample.active + sample.waiting,
    note: (values) => `peak ${number(Math.max(...values))} together`,
  },
  {
    id: "tile-answers",
    title: "Answers",
    value: (now) => number(now.answers),
    series: (sample) => sample.answers,
    fromLeast: true,
    note: (values, now) => `${number(now.answers - Math.min(...values))} new, ${number(now.failed)} failed, ${compact(now.tokens)} tokens`,
  },
];

const EXPORTED = ["tokens_per_second", "time_to_first_token_ms", "active", "waiting", "answers", "failed", "tokens"];

/** What events said of generation in the last minutes, each with its `time`. */
let samples = [];
let hits = { uses: 0, ram: 0, disk: 0, remote: 0, fetched: 0 };

export function startFigures() {
  addTools("figures", { title: "figures of the last five minutes", data: figuresData, toggled: byId("figures").querySelector(".chart") });
  addTools("hits", { title: "experts by where they were", data: hitsData, toggled: byId("hits").querySelector(".chart") });
  byId("hits").querySelector(".bar").append(...HITS.map(({ key }) => element("span", { className: key })));
  new ResizeObserver(draw).observe(byId("figures"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

export function showGeneration(generation, time) {
  samples = [...samples.filter((sample) => sample.time > time - WINDOW_MS), { time, ...generation }];
  hits = generation.experts;
  draw();
  showHits();
}

function draw() {
  const now = samples[samples.length - 1];
  if (!now) return;
  for (const tile of TILES) {
    const points = samples.map((sample) => ({ time: sample.time, value: tile.series(sample) }));
    const values = points.map((point) => point.value).filter((value) => value !== null);
    const [value, canvas, note] = [".value", "canvas", ".note"].map((part) => byId(tile.id).querySelector(part));
    value.textContent = tile.value(now);
    note.textContent = values.length ? tile.note(values, now) : "none yet";
    canvas.ariaLabel = `${tile.title}, last five minutes: now ${value.textContent}, ${note.textContent}`;
    drawSparkline(canvas, points, now.time, tile.fromLeast ? Math.min(...values) : 0);
  }
}

function showHits() {
  const bar = byId("hits").querySelector(".bar");
  const terms = HITS.map(({ key, label }, index) => {
    bar.children[index].style.flexGrow = hits[key];
    const term = element("dt", {}, element("span", { className: `swatch ${key}` }), label);
    return element("div", {}, term, element("dd", {}, number(hits[key]), element("span", { className: "share" }, percent(hits[key], hits.uses))));
  });
  byId("hits").querySelector(".key").replaceChildren(...terms);
}

function figuresData() {
  const row = (sample) => [clock(sample.time), ...EXPORTED.map((key) => sample[key])];
  return { columns: ["time", ...EXPORTED.map(name)], rows: samples.map(row) };
}

function hitsData() {
  const rows = HITS.map(({ key, label }) => [label, hits[key], percent(hits[key], hits.uses)]);
  return { columns: ["where", "uses", "share"], rows: [...rows, ["in all", hits.uses, percent(hits.uses, hits.uses)]] };
}
