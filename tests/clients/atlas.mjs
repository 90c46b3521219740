/**
 * Looks at the page of an atlas with a headless Chromium: node atlas.mjs PAGE OUTPUT_DIR
 *
 * In light and dark, wide and narrow: nothing is asked of any host, axe finds no serious violation, nothing but tables and pictures scrolls sideways.
 * The browser is taken from CHROMIUM (default /usr/bin/chromium). Exits non-zero on failure.
 */

import { mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [page, out] = process.argv.slice(2);
const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const SIZES = { wide: { width: 1440, height: 900 }, narrow: { width: 360, height: 800 } };

let failed = 0;
const expect = (holds, what) => {
  console.log(`${holds ? "ok  " : "FAIL"} ${what}`);
  failed += holds ? 0 : 1;
};

await mkdir(out, { recursive: true });
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
for (const colorScheme of ["light", "dark"]) {
  for (const size of Object.keys(SIZES)) {
    const label = `${colorScheme}-${size}`;
    const context = await browser.newContext({ colorScheme, viewport: SIZES[size] });
    const tab = await context.newPage();
    const asked = [];
    tab.on("request", (request) => asked.push(request.url()));
    tab.on("pageerror", (error) => asked.push(error.message));
    await tab.goto(`file://${page}`);
    expect(asked.length === 1, `${label}: one file, ${asked.length} asked for`);
    await tab.evaluate(AXE);
    const { violations } = await tab.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    const serious = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
    for (const { id, nodes } of serious) console.log(`     axe ${id}: ${nodes.map((node) => node.target.join(" ")).slice(0, 3).join(", ")}`);
    expect(serious.length === 0, `${label}: axe, ${violations.length - serious.length} lesser violations`);
    const wide = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    expect(wide <= 0, `${label}: ${wide} pixels too wide`);
    expect((await tab.locator("svg").count()) >= 8, `${label}: pictures`);
    await tab.screenshot({ path: join(out, `${label}.png`), fullPage: true });
    await context.close();
  }
}
await browser.close();
process.exitCode = failed ? 1 : 0;
