/** The table of peers, and why each is trusted as far as it is. */

import { getJson } from "./api.js";
import { addTools } from "./chart_tools.js";
import { byId, element, table } from "./dom.js";
import { bytes, count, decimals, milliseconds, number, shortId } from "./format.js";

const FACETS = ["bytes", "execution", "profile"];
/** From which first-hand scores on peers are listened to, and may run experts. */
const HEARD = 0.5;
const EXECUTES = 0.7;
const yesNo = (holds) => (holds ? "yes" : "no");

/** What is shown of a peer, and, as plain values, exported. */
const COLUMNS = [
  { title: "Peer", value: ({ peer }) => peer, show: (peer) => element("code", { title: peer }, shortId(peer)) },
  { title: "Connected", value: ({ connected }) => connected, show: yesNo },
  { title: "Ruling", value: ({ ruling }) => ruling, show: (ruling) => element("strong", { className: ruling }, ruling) },
  { title: "Round trip", unit: "ms", value: ({ status }) => status?.round_trip_ms, show: milliseconds },
  { title: "Speed", unit: "bytes/s", value: (peer) => peer.bytes_per_second, show: (speed) => `${bytes(speed)}/s` },
  { title: "Threads", unit: "", value: ({ status }) => status?.threads, show: number },
  { title: "Memory", unit: "bytes", value: ({ status }) => status?.memory_bytes, show: bytes },
  { title: "Room", unit: "bytes", value: ({ status }) => status?.room_bytes, show: bytes },
  { title: "Experts", unit: "", value: ({ status }) => held(status)?.experts, show: number },
  { title: "Runs them", value: ({ status }) => status?.executes, show: yesNo },
  ...FACETS.map((facet, index) => {
    return { title: index ? facet : `Trust: ${facet}`, unit: "", value: ({ trust }) => trust?.[facet], show: (score) => decimals(score, 2) };
  }),
];
const HEADINGS = [...COLUMNS.map(({ title, unit }) => ({ title, numeric: unit !== undefined })), { title: element("span", { className: "unseen" }, "Reasons") }];

let peers = [];
let model = null;
/** Peers whose reasons are open, with what was last heard of them. */
const open = new Map();

export function startPeers() {
  addTools("peers", { title: "peers", data: peersData });
}

/** Tells which model's holdings are shown. */
export function showLoadedModel(id) {
  if (id === model) return;
  model = id;
  show();
}

export async function loadPeers() {
  peers = await getJson("/api/peers");
  show();
}

function show() {
  const focused = document.activeElement?.dataset?.why;
  byId("peers-empty").hidden = peers.length > 0;
  byId("peers-list").hidden = peers.length === 0;
  byId("peers-count").textContent = peers.length ? `${number(peers.filter((peer) => peer.connected).length)} of ${number(peers.length)} connected` : "";
  const made = table("Peers", HEADINGS, peers.map(cells));
  made.caption.className = "unseen";
  peers.forEach((peer, index) => open.has(peer.peer) && made.tBodies[0].children[index].setAttribute("data-open", ""));
  for (const row of made.querySelectorAll("[data-open]")) row.after(reasonRow(row));
  byId("peers-list").replaceChildren(made);
  if (focused) byId("peers-list").querySelector(`[data-why="${CSS.escape(focused)}"]`)?.focus();
}

function cells(peer) {
  const shown = ({ value, show }) => (value(peer) === null || value(peer) === undefined ? "–" : show(value(peer)));
  return [...COLUMNS.map(shown), whyButton(peer.peer)];
}

function held(status) {
  return status?.holdings.find((holding) => holding.model === model);
}

function whyButton(peer) {
  const about = element("span", { className: "unseen" }, ` ${shortId(peer)} is trusted as far as it is`);
  const button = element("button", { type: "button", className: "quiet", "aria-expanded": String(open.has(peer)) }, "Why", about);
  button.dataset.why = peer;
  button.addEventListener("click", () => (open.delete(peer) ? show() : explain(peer)));
  return button;
}

async function explain(peer) {
  open.set(peer, { lines: ["Asking …"] });
  show();
  try {
    open.set(peer, { trust: await getJson(`/api/trust/${encodeURIComponent(peer)}`) });
  } catch (error) {
    open.set(peer, { lines: [error.message] });
  }
  show();
}

function reasonRow(row) {
  const { trust, lines } = open.get(row.querySelector("button").dataset.why);
  const parts = trust ? [...FACETS.map((facet) => reasons(facet, trust[facet])), verdict(trust)] : lines.map((line) => element("p", {}, line));
  return element("tr", { className: "reasons" }, element("td", { colSpan: HEADINGS.length }, element("div", {}, ...parts)));
}

/** A score, and every term that made it. */
function reasons(facet, opinion) {
  const list = terms(facet, opinion).map((term) => element("li", {}, term));
  return element("div", {}, element("h3", {}, `${facet}: ${decimals(opinion.score, 3)}`), element("ul", {}, ...list));
}

function terms(facet, opinion) {
  const firstHand = `first hand: ${decimals(opinion.first_hand, 3)}, the mean less 1.64 standard deviations`;
  return [...seen(opinion), firstHand, ...heard(opinion), meaning(facet, opinion.first_hand)];
}

function seen({ seen_good: good, seen_bad: bad, good: goodLeft, bad: badLeft }) {
  if (good + bad === 0) return ["nothing was seen of it here"];
  const weights = "10 for a wrong result or claim, 2 for wrong bytes, 0.5 for a time-out";
  return [
    `seen here: good ${count(good, "time")}, bad ${count(bad, "time")}`,
    `left of the good: ${decimals(goodLeft, 2)} (half is forgotten in 7 days, no more than 20 count)`,
    `left of the bad: ${decimals(badLeft, 2)} (${weights}; half is forgotten in 30 days)`,
  ];
}

function heard({ hearsay, hearsay_good: more, score }) {
  if (hearsay.length === 0) return [];
  const times = ({ good, bad }) => `good ${count(good, "time")}, bad ${count(bad, "time")}`;
  const said = hearsay.map((voice) => `${shortId(voice.rater)} says: ${times(voice)}; that adds ${decimals(voice.adds, 2)} to the good`);
  const sum = `with what others say, ${decimals(more, 2)} more of good (no more than 5): ${decimals(score, 3)}`;
  return [...said, `${sum}, for the order in which peers are asked`];
}

function meaning(facet, firstHand) {
  if (facet === "execution") {
    const holds = firstHand >= EXECUTES;
    return holds ? `above ${EXECUTES}: what was seen here would do for running experts` : `below ${EXECUTES}: it runs experts only where --execute-at names it`;
  }
  return firstHand >= HEARD ? `above ${HEARD}: what it says of others is listened to` : `below ${HEARD}: what it says of others is not listened to`;
}

function verdict({ ruling, unwelcome }) {
  const words = {
    banned: "You have banned it: it is not talked to (confrere peers allow PEER).",
    allowed: "You have allowed it: it is used whatever its scores.",
    unwelcome: "More of its work was proven wrong than right: it is not talked to until that has faded (confrere peers allow PEER).",
  };
  return element("p", {}, words[ruling ?? (unwelcome ? "unwelcome" : "")] ?? "No ruling: the scores alone decide (confrere peers ban|allow PEER).");
}

function peersData() {
  const columns = COLUMNS.map(({ title, unit }) => (unit ? `${title} (${unit})` : title));
  return { columns, rows: peers.map((peer) => COLUMNS.map(({ value }) => value(peer) ?? null)) };
}
