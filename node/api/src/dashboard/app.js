/** Starts the page: who the node is, the stream of events, and when the rest is asked for again. */

import { follow, getJson, onUnauthorised, useToken } from "./api.js";
import { loadModels, startChat } from "./chat.js";
import { byId, copy } from "./dom.js";
import { loadMap, shownModel, showUse, startExperts } from "./experts.js";
import { showGeneration, startFigures } from "./figures.js";
import { duration, number, shortId } from "./format.js";
import { loadPeers, showLoadedModel, startPeers } from "./peers.js";
import { loadStore, showStorage, startStorage } from "./storage.js";

/** How often what events do not carry is asked for, in milliseconds. */
const EVERY = { node: 30_000, loadingNode: 2000, peers: 15_000, store: 60_000, map: 60_000 };

let node = null;
let nodeSince = 0;
let following = false;
/** The model and the number of peers that the last event told of. */
let told = {};

function start() {
  startFigures();
  startExperts();
  startPeers();
  startStorage();
  startChat();
  onUnauthorised(askForToken);
  byId("token-form").addEventListener("submit", takeToken);
  byId("copy-peer").addEventListener("click", () => copy(node?.peer ?? "", byId("node-peer"), byId("copy-peer")));
  byId("copy-ticket").addEventListener("click", () => copy(node?.ticket ?? "", byId("ticket"), byId("copy-ticket")));
  connect();
  setInterval(showUptime, 1000);
  repeat(loadNode, () => (node?.model?.state === "loading" ? EVERY.loadingNode : EVERY.node));
  repeat(loadPeers, () => EVERY.peers);
  repeat(loadStore, () => EVERY.store);
  repeat(loadMap, () => EVERY.map);
}

/** Calls again and again, each time after the last is done; not while the page is out of sight. */
function repeat(load, wait) {
  setTimeout(async () => {
    if (!document.hidden && byId("token-form").hidden) await quietly(load());
    repeat(load, wait);
  }, wait());
}

/** A request that failed is made again later; the state of the connection says that something is wrong. */
const quietly = (loading) => loading.catch((error) => console.warn(error));

async function connect() {
  if (following) return;
  following = true;
  await follow({ onOpen: opened, onState: showState, onLost: lost });
  following = false;
}

/** What was known may have changed while nothing was heard: all is asked for anew, most of it at the first event. */
function opened() {
  connection("live", "live");
  [node, told] = [null, {}];
  quietly(loadStore());
}

function lost(wait) {
  connection("lost", `not connected; tries again in ${number(wait / 1000)} s`);
}

function connection(state, words) {
  byId("connection").dataset.state = state;
  byId("connection").textContent = words;
}

function askForToken() {
  byId("token-form").hidden = false;
  byId("token").focus();
  connection("lost", "not connected; wants a token");
}

function takeToken(event) {
  event.preventDefault();
  useToken(byId("token").value.trim());
  byId("token-form").reset();
  byId("token-form").hidden = true;
  connection("waiting", "connecting …");
  connect();
}

function showState(state) {
  showGeneration(state.generation, state.time_ms);
  showStorage(state);
  if (state.model !== null && state.model === shownModel()) showUse(state);
  if (state.model !== told.model) quietly(loadNode());
  if (state.peers !== told.peers) quietly(loadPeers());
  told = { model: state.model, peers: state.peers };
}

async function loadNode() {
  const before = modelState();
  node = await getJson("/api/node");
  nodeSince = Date.now() - node.uptime_s * 1000;
  byId("node-peer").textContent = shortId(node.peer);
  byId("node-peer").title = node.peer;
  byId("node-version").textContent = node.version;
  byId("node-model").textContent = node.model ? `${node.model.name}, ${node.model.precision}, ${node.model.state}` : "none loaded";
  showUptime();
  showLoadedModel(node.model?.id ?? null);
  if (modelState() !== before) await loadMap();
  await loadModels(node.model);
}

const modelState = () => node && `${node.model?.id} ${node.model?.state}`;

function showUptime() {
  if (node) byId("node-uptime").textContent = duration((Date.now() - nodeSince) / 1000);
}

start();
