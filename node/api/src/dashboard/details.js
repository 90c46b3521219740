/** One expert in detail: where it is, who has it, and what it is good at. */

import { getJson } from "./api.js";
import { byId, copy, element, fact, table } from "./dom.js";
import { bytes, decimals, name, number, percent, shortId } from "./format.js";
import { PLACES } from "./views.js";

const panel = byId("expert");
let asked = 0;
let onClose = () => {};

/** Opens an expert of a layer; `closed` is called when the user is done with it. */
export async function openExpert({ model, layer, expert }, closed) {
  const question = ++asked;
  onClose = closed;
  const title = element("h3", { id: "expert-title", tabIndex: -1 }, `Layer ${layer}, expert ${expert}`);
  const close = element("button", { type: "button", className: "quiet" }, "Close");
  close.addEventListener("click", closeExpert);
  const body = element("div", {}, element("p", { className: "empty" }, "Asking …"));
  panel.replaceChildren(element("div", { className: "heading" }, title, close), body);
  panel.hidden = false;
  title.focus();
  try {
    const found = await getJson(`/api/experts/${layer}/${expert}?model=${encodeURIComponent(model)}`);
    if (question === asked) body.replaceChildren(...about(found));
  } catch (error) {
    if (question === asked) body.replaceChildren(element("p", { className: "problem", role: "alert" }, error.message));
  }
}

export function closeExpert() {
  panel.hidden = true;
  asked++;
  onClose();
}

panel.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeExpert();
});

function about(expert) {
  return [facts(expert), element("div", { className: "halves" }, providers(expert.holders), domains(expert.domains))];
}

function facts(expert) {
  const hash = element("code", { title: expert.hash }, `${expert.hash.slice(0, 12)}…`);
  const button = element("button", { type: "button", className: "quiet" }, "Copy", element("span", { className: "unseen" }, " the hash"));
  button.addEventListener("click", () => copy(expert.hash, hash, button));
  return element(
    "dl",
    { className: "facts" },
    fact("Where", PLACES[expert.place]),
    fact("Used", `${number(expert.uses)} times`),
    fact("Size", `${bytes(expert.bytes)} at ${expert.precision}`),
    fact("Hash", hash, " ", button),
    ...ofProfile(expert.profile),
  );
}

/** What a profile says of the expert as a whole. */
function ofProfile(profile) {
  if (!profile) return [];
  const others = profile.coactive.map(({ expert, share }) => `${expert} (${percent(share, 1)})`);
  return [
    fact("Serves most", profile.primary_modality ? name(profile.primary_modality) : "nothing surely"),
    fact("Used for", `${percent(profile.activation_frequency, 1)} of the probes' tokens`),
    fact("Together with", others.length ? others.join(", ") : "none"),
  ];
}

function providers(holders) {
  if (holders.length === 0) return element("p", { className: "empty" }, "No peer that is connected says it has this expert.");
  const rows = holders.map(({ peer, trust }) => [element("code", { title: peer }, shortId(peer)), decimals(trust, 3)]);
  return table("Providers", [{ title: "Peer" }, { title: "Trust in its bytes", numeric: true }], rows);
}

function domains(list) {
  if (list.length === 0) {
    const command = element("code", {}, "confrere profile build MODEL");
    return element("p", { className: "empty" }, "Nothing is known of what it is good at: ", command, " measures it.");
  }
  const most = Math.max(1, ...list.map((domain) => domain.upper));
  const columns = [
    { title: "Domain" },
    { title: "Lift", numeric: true },
    { title: "95% bounds", numeric: true },
    { title: `0 to ${decimals(most, 1)}; line: 1` },
    { title: "q", numeric: true },
    { title: "Tokens", numeric: true },
    { title: "Helps", numeric: true },
  ];
  const row = (domain) => [
    domain.specialist ? element("strong", {}, `${name(domain.name)} ★`) : name(domain.name),
    decimals(domain.lift, 2),
    `${decimals(domain.lower, 2)} to ${decimals(domain.upper, 2)}`,
    interval(domain, most),
    domain.q < 0.0001 ? "<0.0001" : decimals(domain.q, 4),
    number(domain.routed),
    domain.trials ? `${percent(domain.hits, domain.trials)} of ${domain.trials}` : "not tried",
  ];
  const strongest = [...list].sort((a, b) => b.lower - a.lower);
  const holder = element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Table of domains" });
  holder.append(table("Domains, by the lower bound of the lift; ★ specialist of it (q ≤ 0.05)", columns, strongest.map(row)));
  return holder;
}

/** The bounds as a bar on a line from 0 to the most, with a mark where routing is as frequent as everywhere else. */
function interval({ lower, upper }, most) {
  const bar = element("span", { className: "bounds" });
  bar.style.left = `${(100 * Math.max(lower, 0)) / most}%`;
  bar.style.width = `${(100 * (upper - Math.max(lower, 0))) / most}%`;
  const even = element("span", { className: "even" });
  even.style.left = `${100 / most}%`;
  return element("span", { className: "interval", "aria-hidden": "true" }, even, bar);
}
