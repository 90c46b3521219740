/** Draws experts as cells on a canvas, a row a layer, and lights up those that have just been used; draws only while something changes. */

import { readColours } from "./views.js";

const FADE_MS = 1600;
/** So long a frame may paint cells; those left over are for the next. */
const PAINT_MS = 3;
/** Letters are still read through the strongest light. */
const BRIGHTEST = 0.8 * 255;
const FRAMES_KEPT = 300;
/** Sizes in CSS pixels: of a cell, and of the margins for the numbers of layers and experts. */
const CELL = { least: 6, most: 30 };
const MARGIN = { left: 24, top: 16 };
const LABEL = 10;
const DIMMED = 0.13;

const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const frameTimes = [];

/** How long the last frames took to draw, in milliseconds: for tests. */
window.confrereFrameTimes = () => [...frameTimes];

export class Heatmap {
  #canvas;
  #context;
  /** The cells as they look unlit; redrawn where something changed. */
  #base = document.createElement("canvas");
  /** One pixel a cell: how strongly it is lit. */
  #glow = document.createElement("canvas");
  #glowPixels;
  #map = null;
  #view;
  #only = null;
  #litAt;
  #dirty = new Set();
  #labelsDirty = false;
  #pending = false;
  #marked = { selected: -1, hovered: -1 };
  #cell = 0;
  #gap = 1;
  #room = 0;
  #colours = readColours();

  constructor(canvas, view) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#view = view;
    new ResizeObserver(([{ contentRect }]) => {
      this.#room = contentRect.width;
      this.#layout();
    }).observe(canvas.parentElement);
    dark.addEventListener("change", () => this.recolour());
  }

  show(map) {
    const sameShape = this.#map?.perLayer === map.perLayer && this.#map.places.length === map.places.length;
    this.#map = map;
    this.#dirty.clear();
    if (!sameShape) this.#unlight(map);
    this.#layout();
  }

  #unlight(map) {
    this.#litAt = new Float64Array(map.places.length).fill(-Infinity);
    [this.#glow.width, this.#glow.height] = [map.perLayer, map.layers.length];
    this.#glowPixels = this.#glow.getContext("2d").createImageData(map.perLayer, map.layers.length);
    this.#colourGlow();
  }

  /** Shows another view; with a key, only cells of that key stay as strong as they are. */
  use(view, only = null) {
    [this.#view, this.#only] = [view, only];
    this.repaint();
  }

  /** Has these cells drawn anew, or all. */
  repaint(indices) {
    for (const index of indices ?? this.#map?.places.keys() ?? []) this.#dirty.add(index);
    this.#schedule();
  }

  /** Lights these cells up. They fade; where the user wants no motion, they stay marked until the next call. */
  light(indices) {
    if (still.matches) this.#litAt.fill(-Infinity);
    const now = performance.now();
    for (const index of indices) this.#litAt[index] = now;
    this.#schedule();
  }

  /** Marks cells: `{selected, hovered}`, −1 for none. */
  mark(cells) {
    Object.assign(this.#marked, cells);
    this.#schedule();
  }

  recolour() {
    this.#colours = readColours();
    if (this.#map) this.#colourGlow();
    this.#labelsDirty = true;
    this.repaint();
  }

  /** The cell at a place in CSS pixels of the canvas, or −1. */
  cellAt(x, y) {
    if (!this.#map) return -1;
    const column = Math.floor((x * devicePixelRatio - this.#left) / this.#cell);
    const row = Math.floor((y * devicePixelRatio - this.#top) / this.#cell);
    const inside = column >= 0 && row >= 0 && column < this.#map.perLayer && row < this.#map.layers.length;
    return inside ? row * this.#map.perLayer + column : -1;
  }

  /** Where a cell is, in CSS pixels of the canvas. */
  placeOf(index) {
    const { x, y } = this.#box(index);
    return { x: x / devicePixelRatio, y: y / devicePixelRatio, size: this.#cell / devicePixelRatio };
  }

  get #left() {
    return Math.round(MARGIN.left * devicePixelRatio);
  }

  get #top() {
    return Math.round(MARGIN.top * devicePixelRatio);
  }

  #layout() {
    if (!this.#map || this.#room === 0) return;
    const scale = devicePixelRatio;
    const fitting = Math.floor((this.#room * scale - this.#left) / this.#map.perLayer);
    this.#cell = Math.min(Math.max(fitting, Math.round(CELL.least * scale)), Math.round(CELL.most * scale));
    this.#gap = Math.max(1, Math.round(this.#cell / 12));
    const width = this.#left + this.#cell * this.#map.perLayer;
    const height = this.#top + this.#cell * this.#map.layers.length;
    if (this.#canvas.width !== width || this.#canvas.height !== height) {
      for (const canvas of [this.#canvas, this.#base]) [canvas.width, canvas.height] = [width, height];
      [this.#canvas.style.width, this.#canvas.style.height] = [`${width / scale}px`, `${height / scale}px`];
    }
    this.#labelsDirty = true;
    this.repaint();
  }

  #box(index) {
    const [row, column] = [Math.floor(index / this.#map.perLayer), index % this.#map.perLayer];
    const side = this.#cell - this.#gap;
    return { x: this.#left + column * this.#cell, y: this.#top + row * this.#cell, width: side, height: side, size: side, scale: devicePixelRatio };
  }

  #schedule() {
    if (this.#pending || !this.#cell) return;
    this.#pending = true;
    requestAnimationFrame(() => this.#frame());
  }

  #frame() {
    const started = performance.now();
    this.#pending = false;
    const unpainted = this.#paintBase(started);
    const fading = this.#updateGlow(started);
    this.#compose();
    frameTimes.push(performance.now() - started);
    if (frameTimes.length > FRAMES_KEPT) frameTimes.shift();
    if (unpainted || fading) this.#schedule();
  }

  /** Returns whether there is more to paint than there was time for. */
  #paintBase(started) {
    const context = this.#base.getContext("2d");
    if (this.#labelsDirty) this.#paintLabels(context);
    for (const index of this.#dirty) {
      if (performance.now() - started > PAINT_MS) return true;
      this.#paintCell(context, index);
      this.#dirty.delete(index);
    }
    return false;
  }

  #paintCell(context, index) {
    const box = this.#box(index);
    context.clearRect(box.x, box.y, box.width, box.height);
    context.globalAlpha = this.#only === null || this.#only === this.#view.key(this.#map, index) ? 1 : DIMMED;
    this.#view.paint(context, box, index, this.#map);
    context.globalAlpha = 1;
  }

  /** Numbers of layers and experts, as many as there is room for. */
  #paintLabels(context) {
    this.#labelsDirty = false;
    const scale = devicePixelRatio;
    context.clearRect(0, 0, this.#base.width, this.#top);
    context.clearRect(0, 0, this.#left, this.#base.height);
    const every = (room) => [1, 2, 4, 8, 16, 32].find((step) => step * this.#cell >= room * scale) ?? 64;
    context.font = `${LABEL * scale}px system-ui, sans-serif`;
    context.fillStyle = this.#colours.muted;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const middle = (this.#cell - this.#gap) / 2;
    for (let row = 0; row < this.#map.layers.length; row += every(LABEL + 3)) {
      context.fillText(this.#map.layers[row], this.#left - 6 * scale, this.#top + row * this.#cell + middle);
    }
    context.textAlign = "center";
    for (let column = 0; column < this.#map.perLayer; column += every(LABEL * 2.4)) {
      context.fillText(column, this.#left + column * this.#cell + middle, this.#top - 8 * scale);
    }
  }

  #colourGlow() {
    const { data } = this.#glowPixels;
    for (let index = 0; index < this.#litAt.length; index++) data.set(this.#colours.glow, index * 4);
  }

  /** Returns whether anything is still going to change. */
  #updateGlow(now) {
    const { data } = this.#glowPixels;
    let lit = false;
    for (let index = 0; index < this.#litAt.length; index++) {
      const left = still.matches ? Number(this.#litAt[index] > 0) : Math.max(0, 1 - (now - this.#litAt[index]) / FADE_MS);
      data[index * 4 + 3] = BRIGHTEST * left;
      lit ||= left > 0;
    }
    this.#glow.getContext("2d").putImageData(this.#glowPixels, 0, 0);
    return lit && !still.matches;
  }

  /** Cells, light on them and around, and marks. */
  #compose() {
    const context = this.#context;
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    context.drawImage(this.#base, 0, 0);
    context.imageSmoothingEnabled = false;
    const around = Math.ceil(this.#gap / 2);
    context.drawImage(this.#glow, this.#left - around, this.#top - around, this.#cell * this.#map.perLayer, this.#cell * this.#map.layers.length);
    for (const index of [this.#marked.hovered, this.#marked.selected]) if (index >= 0) this.#outline(index);
  }

  #outline(index) {
    const { x, y, size, scale } = this.#box(index);
    const outlines = [[2.5, 3, this.#colours.page], [1, 2, this.#colours.ink]];
    for (const [away, width, colour] of outlines) {
      this.#context.strokeStyle = colour;
      this.#context.lineWidth = width * scale;
      this.#context.strokeRect(x - away * scale, y - away * scale, size + 2 * away * scale, size + 2 * away * scale);
    }
  }
}
