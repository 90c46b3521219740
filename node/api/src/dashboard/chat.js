/** The chat: a conversation with the model, its answers as they come, and what each needed. */

import { offer, startAttaching, takeParts } from "./attach.js";
import { ApiError, getJson, readEvents, request } from "./api.js";
import { byId, element } from "./dom.js";
import { bytes, count, decimals, milliseconds, number } from "./format.js";

const log = byId("chat-log");
const form = byId("chat-form");
const text = byId("chat-text");
const problem = byId("chat-error");
const CUT = "The answer broke off: the connection was cut.";
/** As near to the end of the log as this, new text scrolls it. */
const NEAR_PX = 40;

let conversation = [];
let abort = null;
/** What each model takes. */
let inputs = new Map();

export function startChat() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("chat-stop").addEventListener("click", () => abort?.abort());
  byId("chat-new").addEventListener("click", startAnew);
  byId("chat-model").addEventListener("change", offerInputs);
  startAttaching();
  showEmpty();
}

/** Offers the models there are; at first the loaded one is chosen. */
export async function loadModels(loaded) {
  const select = byId("chat-model");
  const { data } = await getJson("/v1/models");
  const before = select.value;
  select.replaceChildren(...data.map(({ id }) => element("option", { value: id }, id)));
  const wanted = [before, loaded?.name, loaded?.id].find((id) => data.some((model) => model.id === id));
  if (wanted) select.value = wanted;
  inputs = new Map(data.map(({ id, modalities }) => [id, modalities?.input ?? []]));
  offerInputs();
}

const offerInputs = () => offer(inputs.get(byId("chat-model").value) ?? []);

function startAnew() {
  abort?.abort();
  conversation = [];
  problem.textContent = "";
  showEmpty();
  text.focus();
}

function showEmpty() {
  log.replaceChildren(element("p", { className: "empty" }, "Nothing said yet. While an answer comes, the experts that it uses light up in the map."));
}

async function send() {
  const content = text.value.trim();
  if (!content || abort) return;
  if (conversation.length === 0) log.replaceChildren();
  const { parts, shown } = takeParts();
  const asked = { role: "user", content: parts.length ? [...parts, { type: "text", text: content }] : content };
  conversation.push(asked);
  text.value = "";
  problem.textContent = "";
  const question = addTurn("You", content);
  question.lastChild.before(...shown);
  const turn = addTurn(byId("chat-model").value || "Model", "");
  const answer = await receive(conversation, turn);
  if (conversation.at(-1) !== asked) return;
  if (answer.text) {
    conversation.push({ role: "assistant", content: answer.text });
  } else {
    conversation.pop();
    text.value ||= content;
    question.remove();
    turn.remove();
    if (conversation.length === 0) showEmpty();
  }
}

/** A turn in the log; returns its element, of which `lastChild` takes text. */
function addTurn(who, content) {
  const turn = element("article", {}, element("h3", {}, who), element("p", { className: "said" }, content));
  log.append(turn);
  toEnd();
  return turn;
}

/** Streams an answer into its turn; what went wrong is said, and what came before that stays. */
async function receive(messages, turn) {
  const said = turn.lastChild;
  const answer = { text: "", reason: null, usage: null, timings: null };
  abort = new AbortController();
  busy(true);
  try {
    await stream(await ask(messages, abort.signal, said), answer, said);
    turn.append(element("p", { className: "note" }, summary(answer)));
  } catch (error) {
    if (error.name === "AbortError") turn.append(element("p", { className: "note" }, "Stopped."));
    else problem.textContent = error.message;
  } finally {
    said.classList.remove("pending");
    abort = null;
    busy(false);
    toEnd();
  }
  return answer;
}

/** Send and Stop take turns, and hand on the focus. */
function busy(now) {
  const buttons = [byId("chat-send"), byId("chat-stop")];
  const [gone, shown] = now ? buttons : buttons.reverse();
  const focused = document.activeElement === gone;
  [gone.hidden, shown.hidden] = [true, false];
  if (focused) shown.focus();
  log.ariaBusy = String(now);
}

/** Asks, and asks again for as long as the model is being loaded. */
async function ask(messages, signal, said) {
  const body = JSON.stringify({ model: byId("chat-model").value, messages, stream: true, stream_options: { include_usage: true }, ...limits() });
  said.classList.add("pending");
  for (;;) {
    try {
      return await request("/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
    } catch (error) {
      if (error.code !== "loading") throw error;
      said.textContent = "The model is being loaded …";
      await pause(error.retryAfterS * 1000, signal);
      said.textContent = "";
    }
  }
}

function limits() {
  const [tokens, temperature] = [byId("chat-tokens"), byId("chat-temperature")].map((field) => field.valueAsNumber);
  return { ...(Number.isFinite(tokens) && { max_tokens: tokens }), ...(Number.isFinite(temperature) && { temperature }) };
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    signal.addEventListener("abort", () => reject(signal.reason));
  });
}

async function stream(response, answer, said) {
  for await (const { event, data } of readEvents(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (event === "error") throw new ApiError(null, chunk.error.message, chunk.error.code);
    const [choice] = chunk.choices;
    answer.reason = choice?.finish_reason ?? answer.reason;
    answer.usage = chunk.usage ?? answer.usage;
    answer.timings = chunk.timings ?? answer.timings;
    if (choice?.delta.content) append(choice.delta.content, answer, said);
  }
  throw new Error(CUT);
}

function append(piece, answer, said) {
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  answer.text += piece;
  said.classList.remove("pending");
  said.append(piece);
  if (follow) toEnd();
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

/** One line on an answer: how long, how fast, and where its experts were. */
function summary({ reason, usage, timings }) {
  const parts = [];
  if (usage) parts.push(`${count(usage.completion_tokens, "token")}${reason === "length" ? " (all that were allowed)" : ""}`);
  if (timings) parts.push(`${decimals(timings.predicted_per_second, 1)} tokens/s`, `first after ${milliseconds(timings.queued_ms + timings.prompt_ms)}`);
  if (usage?.x_experts) parts.push(experts(usage.x_experts));
  return parts.join(" · ");
}

function experts({ needed, ram, disk, remote, fetched, bytes_fetched: size }) {
  const places = `${number(ram)} in memory, ${number(disk)} on disk, ${number(remote)} run at peers, ${number(fetched)} fetched`;
  return `${count(needed, "expert")} needed: ${places}${fetched ? ` (${bytes(size)})` : ""}`;
}
