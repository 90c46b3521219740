/** Pictures, sounds and videos that go with the next message: chosen, dropped, pasted or recorded. */

import { byId, element } from "./dom.js";
import { bytes } from "./format.js";

/** A model's own limit is smaller; this keeps a page from sending what no node takes. */
const BYTES_MAX = 16 * 2 ** 20;
/** What towers hear, in samples a second. */
const SAMPLE_RATE = 16_000;
const KINDS = ["image", "audio", "video"];

const list = byId("chat-attached");
const input = byId("chat-file");
const recordButton = byId("chat-record");
const problem = byId("chat-error");

let attached = [];
let recorder = null;

export function startAttaching() {
  byId("chat-attach").addEventListener("click", () => input.click());
  input.addEventListener("change", async () => {
    await add([...input.files]);
    input.value = "";
  });
  const form = byId("chat-form");
  form.addEventListener("dragover", (event) => event.preventDefault());
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
  byId("chat-text").addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length === 0) return;
    event.preventDefault();
    add(files);
  });
  recordButton.hidden = !navigator.mediaDevices?.getUserMedia;
  recordButton.addEventListener("click", () => (recorder ? recorder.stop() : record()));
}

/** Shows the buttons that a model has use for. */
export function offer(inputs) {
  byId("chat-attach").hidden = !inputs.some((kind) => KINDS.includes(kind));
  recordButton.hidden = !inputs.includes("audio") || !navigator.mediaDevices?.getUserMedia;
  input.accept = inputs.filter((kind) => KINDS.includes(kind)).map((kind) => `${kind}/*`).join(",");
}

/** The parts of a message for what is attached, which is then no longer. */
export function takeParts() {
  const parts = attached.map(({ part }) => part);
  const shown = attached.map(({ preview }) => preview);
  attached = [];
  list.replaceChildren();
  list.hidden = true;
  return { parts, shown };
}

async function add(files) {
  problem.textContent = "";
  for (const file of files) {
    const kind = KINDS.find((kind) => file.type.startsWith(`${kind}/`));
    if (!kind) {
      problem.textContent = `${file.name} is no picture, sound or video.`;
    } else if (file.size > BYTES_MAX) {
      problem.textContent = `${file.name} has ${bytes(file.size)}; ${bytes(BYTES_MAX)} are the limit.`;
    } else {
      show(kind, file, await dataUrl(file));
    }
  }
}

function show(kind, file, url) {
  const one = { part: partOf(kind, url), preview: preview(kind, file) };
  const remove = element("button", { type: "button", className: "quiet" }, "Remove", element("span", { className: "unseen" }, ` ${file.name}`));
  const item = element("li", {}, one.preview.cloneNode(true), element("span", {}, `${file.name}, ${bytes(file.size)}`), remove);
  remove.addEventListener("click", () => {
    attached = attached.filter((other) => other !== one);
    item.remove();
    list.hidden = attached.length === 0;
    byId("chat-text").focus();
  });
  attached.push(one);
  list.append(item);
  list.hidden = false;
}

function preview(kind, file) {
  const src = URL.createObjectURL(file);
  if (kind === "image") return element("img", { src, alt: file.name });
  return element(kind, { src, controls: true, preload: "metadata", "aria-label": file.name });
}

function partOf(kind, url) {
  if (kind === "audio") return { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: "wav" } };
  return { type: `${kind}_url`, [`${kind}_url`]: { url } };
}

const dataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });

async function record() {
  problem.textContent = "";
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.addEventListener("dataavailable", ({ data }) => pieces.push(data));
    recorder.addEventListener("stop", async () => {
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      label("Record");
      await add([await asWav(new Blob(pieces))]);
    });
    recorder.start();
    label("Stop recording");
  } catch (error) {
    problem.textContent = `Nothing can be recorded: ${error.message}`;
  }
}

function label(words) {
  recordButton.textContent = words;
  recordButton.ariaPressed = String(recorder !== null);
}

/** Whatever the browser records, as mono WAV of 16 bits. */
async function asWav(blob) {
  const decoded = await new AudioContext().decodeAudioData(await blob.arrayBuffer());
  const length = Math.max(1, Math.ceil(decoded.duration * SAMPLE_RATE));
  const offline = new OfflineAudioContext(1, length, SAMPLE_RATE);
  const source = offline.createBufferSource();
  source.buffer = decoded;
  source.connect(offline.destination);
  source.start();
  const samples = (await offline.startRendering()).getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, word) => [...word].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  [[16, 16, 4], [20, 1, 2], [22, 1, 2], [24, SAMPLE_RATE, 4], [28, 2 * SAMPLE_RATE, 4], [32, 2, 2], [34, 16, 2]].forEach(([at, value, size]) =>
    size === 4 ? view.setUint32(at, value, true) : view.setUint16(at, value, true),
  );
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, Math.round(32_767 * Math.max(-1, Math.min(1, sample))), true));
  return new File([view.buffer], "recording.wav", { type: "audio/wav" });
}
