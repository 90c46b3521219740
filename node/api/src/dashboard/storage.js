/** What is being fetched, and how the store is. */

import { getJson } from "./api.js";
import { addTools } from "./chart_tools.js";
import { byId, element, fact, table } from "./dom.js";
import { bytes, duration, name, number, percent } from "./format.js";

const COLUMNS = [{ title: "What" }, { title: "Progress" }, { title: "Fetched", numeric: true }, { title: "Peers", numeric: true }];

let transfers = [];
let store = null;

export function startStorage() {
  addTools("transfers", { title: "transfers", data: transfersData });
  addTools("store", { title: "the store", data: storeData, toggled: byId("store").querySelector(".chart") });
}

export async function loadStore() {
  store = await getJson("/api/store");
  showStore();
}

/** What an event says of transfers and of the store's size. */
export function showStorage(state) {
  transfers = state.transfers;
  showTransfers();
  if (!store) return;
  Object.assign(store, state.store);
  showStore();
}

function showTransfers() {
  byId("transfers-empty").hidden = transfers.length > 0;
  byId("transfers-list").hidden = transfers.length === 0;
  const made = table("Transfers", COLUMNS, transfers.map(transferCells));
  made.caption.className = "unseen";
  byId("transfers-list").replaceChildren(made);
}

function transferCells({ name: what, bytes: done, total, peers }) {
  const bar = element("progress", { max: total, value: done, "aria-label": `${what}: ${percent(done, total)}` });
  return [what, element("span", { className: "progress" }, bar, percent(done, total)), `${bytes(done)} of ${bytes(total)}`, number(peers)];
}

function showStore() {
  const { bytes: size, bytes_max: most, disk_free_bytes: free } = store;
  byId("store-quota").textContent = most === null ? `${bytes(size)}, no quota` : `${bytes(size)} of ${bytes(most)}, ${percent(size, most)}`;
  byId("store-progress").value = size / (most ?? size + free);
  byId("store-facts").replaceChildren(
    fact("Free on disk", bytes(free)),
    fact("Blobs", number(store.blobs)),
    fact("Last verified", verified()),
    fact("Quarantined", store.quarantined ? element("strong", { className: "problem" }, number(store.quarantined)) : "none"),
  );
}

function verified() {
  const oldest = store.oldest_verified_at_ms;
  const never = store.unverified ? `${number(store.unverified)} never` : "";
  if (oldest === null) return never || "–";
  return `all within ${duration((Date.now() - oldest) / 1000)}${never && `, but ${never}`}`;
}

function transfersData() {
  const row = (transfer) => [transfer.name, transfer.bytes, transfer.total, transfer.peers];
  return { columns: ["what", "bytes", "of bytes", "peers"], rows: transfers.map(row) };
}

function storeData() {
  return { columns: ["what", "value"], rows: Object.entries(store ?? {}).map(([key, value]) => [name(key), value]) };
}
