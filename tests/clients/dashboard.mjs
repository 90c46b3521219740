/**
 * Looks at the dashboard with a headless Chromium: node dashboard.mjs BASE_URL OUTPUT_DIR
 *
 * In light and dark, wide and narrow: the map is drawn, nothing breaks the content security policy or asks another host, axe finds no
 * serious violation; a chat is answered and lights the map up; tables, CSV, keyboard and details work; frames are drawn in time.
 * The token is taken from CONFRERE_TOKEN, the browser from CHROMIUM (default /usr/bin/chromium). Exits non-zero on failure.
 */

import { mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [base, out] = process.argv.slice(2);
if (!base || !out) {
  console.error("usage: node dashboard.mjs BASE_URL OUTPUT_DIR");
  process.exit(2);
}
const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const SIZES = { wide: { width: 1440, height: 900 }, narrow: { width: 400, height: 800 } };
const FRAME_MAX_MS = 16;
const PROMPT = "Write a haiku about rivers.";

const failures = [];
const expect = (holds, what) => {
  console.log(`${holds ? "ok  " : "FAIL"} ${what}`);
  if (!holds) failures.push(what);
};

await mkdir(out, { recursive: true });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
try {
  for (const colorScheme of ["light", "dark"]) {
    for (const size of Object.keys(SIZES)) await visit(`${colorScheme}-${size}`, { colorScheme, viewport: SIZES[size] });
  }
  await withoutMotion();
} finally {
  await browser.close();
}
console.log(failures.length ? `${failures.length} failed` : "all well");
process.exitCode = failures.length ? 1 : 0;

async function visit(label, options) {
  const { page, complaints, close } = await open(options);
  await check(label, async () => {
    await chat(page, label);
    if (await page.isVisible("#chat-attach")) await attaching(page, label);
    await page.screenshot({ path: join(out, `${label}-top.png`) });
    await page.screenshot({ path: join(out, `${label}.png`), fullPage: true });
    await views(page, label);
    await details(page, label);
    await tables(page, label);
    await accessible(page, label);
    await fits(page, label);
    await frames(page, label);
  });
  expect(complaints.length === 0, `${label}: no errors, no other hosts ${complaints.join(" | ")}`);
  await close();
}

/** An exception (most often a time-out) is one failure, not the end of the run. */
async function check(label, steps) {
  try {
    await steps();
  } catch (error) {
    expect(false, `${label}: ${error.message}`);
  }
}

/** Opens the page and waits for the map. */
async function open(options) {
  const context = await browser.newContext({ acceptDownloads: true, ...options });
  const page = await context.newPage();
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(`uncaught: ${error.message}`));
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && !message.text().includes("status of 404") && complaints.push(message.text()));
  page.on("request", (request) => {
    const url = new URL(request.url());
    if (url.protocol !== "blob:" && url.origin !== new URL(base).origin) complaints.push(`asked ${url}`);
  });
  page.setDefaultTimeout(30_000);
  if (process.env.CONFRERE_TOKEN) await page.addInitScript((token) => sessionStorage.setItem("confrere-token", token), process.env.CONFRERE_TOKEN);
  await page.goto(base);
  await page.waitForSelector("#connection[data-state=live]");
  return { page, complaints, close: () => context.close() };
}

function mapIsDrawn(page) {
  return page.waitForFunction(() => document.querySelector("#map-canvas").clientWidth > 100 && window.confrereFrameTimes().length > 0);
}

/** Asks something; a node that has no model loaded loads one for it, and the map appears. */
async function chat(page, label) {
  await page.waitForFunction(() => document.querySelector("#chat-model").options.length > 0);
  await page.fill("#chat-tokens", "48");
  await page.fill("#chat-text", PROMPT);
  await page.press("#chat-text", "Enter");
  await page.waitForSelector("#chat-log .note", { timeout: 120_000 });
  const said = await page.textContent("#chat-log article:last-of-type .said");
  const note = await page.textContent("#chat-log .note");
  expect(said.trim().length > 0, `${label}: an answer of ${said.length} characters`);
  expect(/tokens? .*tokens\/s · first after .* experts? needed: /.test(note), `${label}: ${note}`);
  await mapIsDrawn(page);
  expect(await inks(page) > 3, `${label}: the map has colours`);
}

/** Asks about a picture and a sound, by keyboard where a file need not be chosen; what was attached is shown, and can be taken back. */
async function attaching(page, label) {
  const media = process.env.MEDIA;
  const before = await page.locator("#chat-log article").count();
  await page.setInputFiles("#chat-file", ["c_64x64.png", "short.wav", "a_75x53.png"].map((name) => join(media, name)));
  await page.waitForFunction(() => document.querySelectorAll("#chat-attached li").length === 3);
  await page.locator("#chat-form").screenshot({ path: join(out, `${label}-attached.png`) });
  await accessible(page, `${label}, files attached`);
  await page.locator("#chat-attached li:last-child button").focus();
  await page.keyboard.press("Enter");
  expect((await page.locator("#chat-attached li").count()) === 2, `${label}: an attachment is taken back`);
  await page.fill("#chat-text", "What is it?");
  await page.press("#chat-text", "Enter");
  await page.waitForFunction((count) => document.querySelectorAll("#chat-log .note").length > count / 2, before, { timeout: 60_000 });
  const problem = await page.textContent("#chat-error");
  expect(problem === "", `${label}: about a picture and a sound ${problem}`);
  const shown = page.locator("#chat-log article").nth(before);
  expect((await shown.locator("img").count()) === 1 && (await shown.locator("audio").count()) === 1, `${label}: what was asked about is shown`);
  await page.locator("#chat").screenshot({ path: join(out, `${label}-pictures.png`) });
  await page.check("input[name=view][value=modality]");
  await page.waitForFunction(() => [2, 3].every((kind) => Number(document.querySelector(`#map-legend button:nth-child(${kind}) .number`)?.textContent) > 0));
  await page.waitForTimeout(2000); // until the experts that were just used glow no more
  await page.locator("#map").screenshot({ path: join(out, `${label}-modality.png`) });
  await accessible(page, `${label}, by modality`);
}

/** How many colours the map has. */
function inks(page) {
  return page.evaluate(() => {
    const canvas = document.querySelector("#map-canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
  });
}

async function views(page, label) {
  for (const view of ["uses", "domain", "place"]) {
    await page.check(`input[name=view][value=${view}]`);
    await page.locator("#map").screenshot({ path: join(out, `${label}-${view}.png`) });
    expect((await page.locator("#map-legend button").count()) > 0, `${label}: legend of ${view}`);
  }
  const first = page.locator("#map-legend button").first();
  await first.click();
  expect((await first.getAttribute("aria-pressed")) === "true", `${label}: the legend shows one kind alone`);
  await first.click();
}

async function details(page, label) {
  await page.focus("#map-canvas");
  for (const key of ["End", "Home", "ArrowRight", "ArrowDown"]) await page.keyboard.press(key);
  const readout = await page.textContent("#map-readout");
  expect(/^Layer \d+, expert 1: /.test(readout), `${label}: ${readout}`);
  await page.keyboard.press("Enter");
  await page.waitForSelector("#expert .facts");
  if (await page.locator("#expert .interval").count()) {
    const facts = await page.textContent("#expert .facts");
    expect(["Serves most", "Used for", "Together with"].every((fact) => facts.includes(fact)), `${label}: what the profile says of the expert`);
  }
  await page.waitForTimeout(300);
  await page.locator("#expert").screenshot({ path: join(out, `${label}-expert.png`) });
  await accessible(page, `${label}, an expert open`);
  await page.keyboard.press("Escape");
  expect(await page.evaluate(() => document.activeElement.id === "map-canvas"), `${label}: Escape leads back to the map`);
  const why = page.locator("#peers-list button").first();
  if (await why.count()) {
    await why.click();
    await page.waitForSelector(".reasons ul");
    await page.locator("#peers").screenshot({ path: join(out, `${label}-peers.png`) });
  }
}

async function tables(page, label) {
  for (const section of ["figures", "hits", "experts", "store"]) {
    const button = page.locator(`#${section} .tools button[aria-pressed]`);
    await button.click();
    expect((await page.locator(`#${section} .as-table tbody tr`).count()) > 0, `${label}: ${section} as a table`);
    if (section !== "experts") await accessible(page, `${label}, ${section} as a table`);
    await button.click();
  }
  for (const section of ["figures", "hits", "experts", "peers", "transfers", "store"]) {
    const [download] = await Promise.all([page.waitForEvent("download"), page.locator(`#${section} .tools button`, { hasText: "CSV" }).click()]);
    const lines = (await readFile(await download.path(), "utf8")).trim().split("\r\n");
    expect(lines[0].includes(","), `${label}: ${download.suggestedFilename()} of ${lines.length} lines`);
  }
}

async function accessible(page, label) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  for (const { impact, id, nodes } of violations) console.log(`     axe ${impact} ${id}: ${nodes.map((node) => node.target.join(" ")).slice(0, 3).join(", ")}`);
  expect(!violations.some(({ impact }) => impact === "serious" || impact === "critical"), `${label}: axe, ${violations.length} lesser violations`);
}

async function fits(page, label) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  expect(wide <= 0, `${label}: nothing is wider than the page`);
}

async function frames(page, label) {
  const times = (await page.evaluate(() => window.confrereFrameTimes())).sort((a, b) => a - b);
  const [median, high, most] = [0.5, 0.95, 1].map((share) => times[Math.ceil(share * times.length) - 1]);
  const words = [median, high, most].map((ms) => ms.toFixed(2)).join(", ");
  expect(high <= FRAME_MAX_MS, `${label}: ${times.length} frames drawn; median, 95th percentile and most: ${words} ms`);
}

/** With reduced motion, used experts are marked, and no frame follows another by itself. */
async function withoutMotion() {
  const { page, close } = await open({ reducedMotion: "reduce" });
  await check("reduced motion", async () => {
    await mapIsDrawn(page);
    await page.evaluate(() => {
      window.frames = 0;
      const request = window.requestAnimationFrame;
      window.requestAnimationFrame = (callback) => request.call(window, (time) => { window.frames++; callback(time); });
    });
    await page.waitForTimeout(2000);
    const drawn = await page.evaluate(() => window.frames);
    expect(drawn <= 12, `reduced motion: ${drawn} frames in two seconds`);
  });
  await close();
}
