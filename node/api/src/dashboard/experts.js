/** The section of the map of experts: loads the map, keeps it up with the events, and lets mouse and keyboard walk through it. */

import { getJson } from "./api.js";
import { addTools } from "./chart_tools.js";
import { openExpert } from "./details.js";
import { byId, element } from "./dom.js";
import { count, name, number } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { PLACES, VIEWS, ceiling, describe, lettersOf, sharesOf } from "./views.js";

const ROWS_A_PAGE = 8;
const SWATCH = 14;
const HINT = "Arrow keys move, Enter or a click opens an expert.";
const NO_MODEL = ["No model is loaded: ask something in the chat, or start with ", "confrere serve --model MODEL", "."];
const NO_PROFILE = ["Nothing is known yet of what experts are good at: ", "confrere profile build MODEL", " measures it."];

const canvas = byId("map-canvas");
const tip = byId("map-tip");
const readout = byId("map-readout");
const legend = byId("map-legend");

let map = null;
let heatmap = null;
let view = "place";
let only = null;
let selected = 0;

export function startExperts() {
  heatmap = new Heatmap(canvas, VIEWS[view]);
  addTools("experts", { title: "experts", data: mapData, toggled: byId("experts").querySelector(".chart") });
  byId("map").hidden = true;
  document.querySelectorAll("input[name=view]").forEach((radio) => radio.addEventListener("change", () => choose(radio.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showLegend);
  listenToMouse();
  listenToKeys();
}

/** Loads the map of the model that is loaded, or of the first; without a model says what to do. */
export async function loadMap() {
  const models = await getJson("/api/models");
  const model = models.find(({ loaded }) => loaded) ?? models[0];
  if (model) {
    const fresh = await getJson(`/api/experts/map?model=${model.id}`);
    const { place, layers, experts_per_layer: perLayer, ...rest } = fresh;
    const another = map?.model !== fresh.model;
    map = { ...rest, places: place, layers, perLayer, usesMax: usesMax(fresh.uses), letters: lettersOf(fresh.domains) };
    map.shares = sharesOf(map);
    showModalities(map.uses_by_modality);
    byId("map").hidden = false;
    heatmap.show(map);
    if (another) startAnew();
    showTexts();
    showLegend();
  } else {
    map = null;
    byId("map").hidden = true;
    showEmpty(NO_MODEL);
  }
}

function startAnew() {
  selected = 0;
  byId("expert").hidden = true;
  choose(view);
}

export const shownModel = () => map?.model ?? null;

/** What an event says of experts: those used light up, those that moved look different. */
export function showUse({ used, place }) {
  if (!map) return;
  for (const [index, times, image, audio] of used) {
    map.uses[index] += times;
    if (map.uses_by_modality.image) map.uses_by_modality.image[index] += image;
    if (map.uses_by_modality.audio) map.uses_by_modality.audio[index] += audio;
  }
  if (used.length) map.shares = sharesOf(map);
  for (const [index, now] of place) map.places[index] = now;
  heatmap.light(used.map(([index]) => index));
  const most = usesMax(map.uses);
  const changed = { uses: most === map.usesMax ? used.map(([index]) => index) : undefined, place: place.map(([index]) => index), domain: [], modality: used.length ? undefined : [] };
  map.usesMax = most;
  heatmap.repaint(changed[view]);
  if (used.length || place.length) showLegend();
}

/** The view by modality is there for models that see or hear. */
function showModalities(modalities) {
  const none = Object.keys(modalities).length === 0;
  byId("modality-view").hidden = none;
  if (none && view === "modality") document.querySelector("input[name=view][value=place]").click();
}

const usesMax = (uses) => ceiling(uses.reduce((most, times) => Math.max(most, times), 1));

function choose(chosen) {
  [view, only] = [chosen, null];
  heatmap.use(VIEWS[view]);
  readout.textContent = HINT;
  legend.replaceChildren();
  showTexts();
  showLegend();
}

function showTexts() {
  const size = `${count(map.layers.length, "layer")} × ${count(map.perLayer, "expert")} = ${number(map.places.length)}`;
  byId("map-size").textContent = `${map.name}: ${size}`;
  canvas.ariaLabel = `Experts of ${map.name}: ${size}`;
  showEmpty(view === "domain" && map.domains.length === 0 ? NO_PROFILE : null);
}

function showEmpty(text) {
  const place = byId("map-empty");
  place.hidden = text === null;
  if (text) place.replaceChildren(text[0], element("code", {}, text[1]), text[2]);
}

/** Makes the legend, or only brings its counts up to date, so that a focused button stays. */
function showLegend() {
  if (!map) return;
  const items = VIEWS[view].legend(map);
  if (legend.children.length !== items.length) legend.replaceChildren(...items.map(legendButton));
  items.forEach((item, index) => {
    const button = legend.children[index];
    button.ariaPressed = String(only === item.key);
    button.querySelector(".number").textContent = number(item.count);
    paintSwatch(button.querySelector("canvas"), item.sample);
  });
}

function legendButton(item) {
  const swatch = element("canvas", { "aria-hidden": "true" });
  const button = element("button", { type: "button", className: "quiet" }, swatch, item.label, " ", element("span", { className: "number" }));
  button.addEventListener("click", () => {
    only = only === item.key ? null : item.key;
    heatmap.use(VIEWS[view], only);
    showLegend();
  });
  return button;
}

function paintSwatch(swatch, sample) {
  const side = Math.round(SWATCH * devicePixelRatio);
  [swatch.width, swatch.height] = [side, side];
  const box = { x: 0, y: 0, width: side, height: side, size: side, scale: devicePixelRatio };
  VIEWS[view].paint(swatch.getContext("2d"), box, 0, sample);
}

function listenToMouse() {
  const hover = (event) => {
    const index = heatmap.cellAt(event.offsetX, event.offsetY);
    heatmap.mark({ hovered: index });
    canvas.classList.toggle("on-cell", index >= 0);
    if (index >= 0) showTip(index);
    else tip.hidden = true;
  };
  canvas.addEventListener("pointermove", hover);
  canvas.addEventListener("pointerleave", () => {
    heatmap.mark({ hovered: -1 });
    tip.hidden = true;
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));
  canvas.addEventListener("click", (event) => {
    const index = heatmap.cellAt(event.offsetX, event.offsetY);
    if (index < 0) return;
    selected = index;
    open();
  });
}

function showTip(index) {
  tip.textContent = describe(map, index);
  tip.hidden = false;
  const { x, y, size } = heatmap.placeOf(index);
  const frame = byId("map-frame");
  const left = Math.max(0, Math.min(x - frame.scrollLeft, frame.clientWidth - tip.offsetWidth));
  tip.style.transform = `translate(${left}px, ${frame.offsetTop + y + size + 8}px)`;
}

function listenToKeys() {
  const moves = {
    ArrowLeft: (at, row) => Math.max(at - 1, row),
    ArrowRight: (at, row) => Math.min(at + 1, row + map.perLayer - 1),
    ArrowUp: (at) => at - map.perLayer,
    ArrowDown: (at) => at + map.perLayer,
    PageUp: (at) => at - ROWS_A_PAGE * map.perLayer,
    PageDown: (at) => at + ROWS_A_PAGE * map.perLayer,
    Home: (at, row) => row,
    End: (at, row) => row + map.perLayer - 1,
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.ctrlKey) return;
    if (event.key === "Enter" || event.key === " ") open();
    else if (moves[event.key]) select(moves[event.key](selected, selected - (selected % map.perLayer)));
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && select(selected));
  canvas.addEventListener("blur", () => heatmap.mark({ selected: -1 }));
}

/** Goes to a cell; beyond the first or the last layer, to the one in the same column there. */
function select(index) {
  const column = ((index % map.perLayer) + map.perLayer) % map.perLayer;
  const row = Math.min(Math.max(Math.floor(index / map.perLayer), 0), map.layers.length - 1);
  selected = row * map.perLayer + column;
  heatmap.mark({ selected });
  readout.textContent = describe(map, selected);
  keepInSight(heatmap.placeOf(selected));
}

function keepInSight({ x, size }) {
  const frame = byId("map-frame");
  if (x < frame.scrollLeft + size * 2) frame.scrollLeft = x - size * 4;
  else if (x + size * 3 > frame.scrollLeft + frame.clientWidth) frame.scrollLeft = x + size * 5 - frame.clientWidth;
}

function open() {
  const [row, expert] = [Math.floor(selected / map.perLayer), selected % map.perLayer];
  openExpert({ model: map.model, layer: map.layers[row], expert }, () => canvas.focus());
}

function mapData() {
  const media = map ? Object.keys(map.uses_by_modality) : [];
  const columns = ["layer", "expert", "where", "peers with it", "uses", ...media.map((kind) => `uses by ${kind}`), "leading domain", "lift at least"];
  const leading = (index) => (map.domain[index] < 0 ? [null, null] : [name(map.domains[map.domain[index]]), map.lift[index]]);
  const slot = (index) => [map.layers[Math.floor(index / map.perLayer)], index % map.perLayer];
  const row = (place, index) => [...slot(index), PLACES[place], map.holders[index], map.uses[index], ...media.map((kind) => map.uses_by_modality[kind][index]), ...leading(index)];
  return { columns, rows: map ? map.places.map(row) : [] };
}
