/** Talks to the node: requests with the token if there is one, and server-sent events read from a response. */

const TOKEN = "confrere-token";
const SILENCE_MS = 45_000;
const BACK_OFF_MS = { first: 1000, most: 30_000 };

export class ApiError extends Error {
  constructor(status, message, code, retryAfterS) {
    super(message);
    Object.assign(this, { status, code, retryAfterS });
  }
}

let askForToken = () => {};

/** `ask` is called whenever the node refuses a request for want of a token. */
export function onUnauthorised(ask) {
  askForToken = ask;
}

export function useToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) askForToken();
  throw await failure(response);
}

export async function getJson(path) {
  return (await request(path)).json();
}

async function failure(response) {
  const { error } = await response.json().catch(() => ({}));
  return new ApiError(response.status, error?.message ?? `HTTP ${response.status}`, error?.code, Number(response.headers.get("Retry-After")) || 1);
}

/** The events of a stream as `{event, data}`, data as text; comments such as `: ping` are passed over. */
export async function* readEvents(response, onBytes = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      onBytes();
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const of = (field) => lines.filter((line) => line.startsWith(field)).map((line) => line.slice(field.length).replace(/^ /, ""));
        const data = of("data:");
        if (data.length) yield { event: of("event:").at(-1) ?? "message", data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Follows /api/events, again and again with longer waits; returns once the node wants a token. */
export async function follow({ onOpen, onState, onLost }) {
  let wait = BACK_OFF_MS.first;
  for (;;) {
    try {
      await listen(() => {
        wait = BACK_OFF_MS.first;
        onOpen();
      }, onState);
    } catch (error) {
      if (error.status === 401) return;
      console.warn(error);
    }
    onLost(wait);
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 2, BACK_OFF_MS.most);
  }
}

/** Reads events until the line ends, or nothing at all has come for a while. */
async function listen(onOpen, onState) {
  const abort = new AbortController();
  let watch = 0;
  const heard = () => {
    clearTimeout(watch);
    watch = setTimeout(() => abort.abort(), SILENCE_MS);
  };
  heard();
  try {
    const response = await request("/api/events", { signal: abort.signal });
    onOpen();
    for await (const { event, data } of readEvents(response, heard)) {
      if (event === "state") onState(JSON.parse(data));
    }
  } finally {
    clearTimeout(watch);
  }
}
