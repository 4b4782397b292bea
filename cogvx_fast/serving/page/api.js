// Requests to the server of this page, with a key where it asks for one, and the events of a job.

const KEY = "cogvx-fast-key";
const FIRST_WAIT = 500; // ms until a cut stream is asked for again; doubled each time
const LONGEST_WAIT = 8000;
const SILENCE = 40_000; // ms: the server says something every 15 s
const ENDS = new Set(["completed", "failed", "deleted"]);

export class ApiError extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

// A page in somebody's frame may be denied storage: the key lives as long as the page then.
let inMemory = "";

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return inMemory;
  }
}

export function setKey(value) {
  inMemory = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // kept in memory
  }
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key()) headers.set("Authorization", `Bearer ${key()}`);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(0, { message: "The server does not answer.", code: "unreachable" });
  }
  if (response.ok) return response;
  let said = { message: `The server answers ${response.status}.` };
  try {
    said = (await response.json()).error ?? said;
  } catch {
    // something on the way answered, and not in JSON
  }
  throw new ApiError(response.status, said);
}

const json = async (path, options) => (await request(path, options)).json();
const videoPath = (id, rest = "") => `v1/videos/${encodeURIComponent(id)}${rest}`;
const post = (path, body) =>
  json(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

export const about = () => json("page/about");
export const video = (id) => json(videoPath(id));
export const remove = (id) => json(videoPath(id), { method: "DELETE" });
export const cancel = (id) => json(videoPath(id, "/cancel"), { method: "POST" });
export const remix = (id, body) => post(videoPath(id, "/remix"), body);
export const create = (form) => json("v1/videos", { method: "POST", body: form });
export const content = async (id, variant) => (await request(videoPath(id, `/content?variant=${variant}`))).blob();

export function list(limit, after = null) {
  const query = new URLSearchParams({ limit });
  if (after) query.set("after", after);
  return json(`v1/videos?${query}`);
}

/** Tell the events of a job until it ends: `tell(name, data)`; "cut" while the connection is gone. */
export async function follow(id, tell, signal) {
  let wait = FIRST_WAIT;
  while (!signal.aborted) {
    try {
      for await (const [name, data] of stream(id, signal)) {
        if (signal.aborted) return;
        wait = FIRST_WAIT;
        tell(name, data);
        if (ENDS.has(name)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 404) return tell("deleted", { id });
      if (error.status >= 400 && error.status < 500) throw error;
    }
    tell("cut", null);
    await new Promise((done) => setTimeout(done, wait));
    wait = Math.min(2 * wait, LONGEST_WAIT);
  }
}

// EventSource sends no Authorization header, so the stream is read here.
async function* stream(id, signal) {
  const silent = new AbortController();
  let timer = setTimeout(() => silent.abort(), SILENCE);
  try {
    const response = await request(videoPath(id, "/events"), { signal: AbortSignal.any([signal, silent.signal]) });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silent.abort(), SILENCE);
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const fields = new Map(block.split("\n").map((line) => line.split(/: ?(.*)/s).slice(0, 2)));
        if (fields.has("event")) yield [fields.get("event"), JSON.parse(fields.get("data"))];
      }
    }
  } finally {
    clearTimeout(timer);
    silent.abort(); // also where the reader of these has enough
  }
}
