// The server, as any client of fal's sees it: the queue, its events, uploads. Everything goes to this origin.

const base = new URL(".", document.baseURI);
let key = sessionStorage.getItem("key") ?? "";

export const setKey = (given) => sessionStorage.setItem("key", (key = given));

export class Refused extends Error {
  constructor(status, body) {
    const entries = Array.isArray(body?.detail) ? body.detail : [];
    super(entries[0]?.msg ?? (typeof body?.detail === "string" ? body.detail : `The server answered ${status}.`));
    this.status = status;
    this.body = body;
    // Whether this server gave it, rather than a proxy in front: also a request may end with a 500.
    this.isAnswer = body?.detail !== undefined;
    // Where each problem is: [["prompt", "Field required"], ...].
    this.problems = entries.map(({ loc, msg }) => [loc.slice(1).join("."), msg]);
  }
}

async function call(path, { headers = {}, ...options } = {}) {
  const authorized = key ? { authorization: `Key ${key}`, ...headers } : headers;
  const response = await fetch(new URL(path, base), { ...options, headers: authorized });
  if (!response.ok) {
    throw new Refused(response.status, await response.json().catch(() => null));
  }
  return response;
}

const json = async (path, options) => (await call(path, options)).json();
const app = (endpoint) => endpoint.split("/").slice(0, 2).join("/");
const requestPath = ({ endpoint, requestId }) => `queue/${app(endpoint)}/requests/${requestId}`;

export const status = () => json("status.json");
export const playground = () => json("playground.json");
export const documentOf = (endpoint) =>
  json(`api/openapi/queue/openapi.json?endpoint_id=${encodeURIComponent(endpoint)}`);

// A page of what this key asked for, the newest first, with what it sent and got.
export const earlier = (cursor) =>
  json(`v1/models/requests/by-endpoint?${new URLSearchParams({
    expand: "payloads", limit: 20, start: "1970-01-01", ...(cursor && { cursor }),
  })}`);

export const submit = (endpoint, input) =>
  json(`queue/${endpoint}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(input),
  });

export const cancel = (run) => json(`${requestPath(run)}/cancel`, { method: "PUT" }).catch(() => null);

export const forget = (run) => call(requestPath(run), { method: "DELETE" }).catch(() => null);

// A browser opens six connections to one server, for all its tabs: the rest is for pictures, and for cancelling.
const MOST_STREAMS = 3;
const POLL_EVERY = 1500;
const LONGEST_WAIT = 15_000;
let streams = 0;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
// A proxy in front answers for a server that is being restarted.
const isFinal = (error) => error instanceof Refused && error.status < 500;

// Each status of a request until it is done, by stream or, where there are many, by asking. `logs` are all so far.
// Begins anew where the connection breaks, as it does at a restart.
export async function* statuses(run) {
  for (let failures = 0; ; failures += 1) {
    const isStreamed = streams < MOST_STREAMS;
    if (isStreamed) streams += 1;
    try {
      for await (const status of isStreamed ? streamed(run) : asked(run)) {
        failures = 0;
        yield status;
        if (status.status === "COMPLETED") return;
      }
    } catch (error) {
      if (isFinal(error)) throw error;
      yield { status: "UNREACHABLE" };
    } finally {
      if (isStreamed) streams -= 1;
    }
    await pause(Math.min(LONGEST_WAIT, 500 * 2 ** failures));
  }
}

async function* streamed(run) {
  const response = await call(`${requestPath(run)}/status/stream?logs=1&previews=1`);
  const logs = [];
  for await (const status of events(response.body)) {
    logs.push(...(status.logs ?? []));
    yield { ...status, logs };
  }
}

// Until there is room for a stream.
async function* asked(run) {
  while (streams >= MOST_STREAMS) {
    yield await json(`${requestPath(run)}/status?logs=1`);
    await pause(POLL_EVERY);
  }
}

// The result, or the error that it ended with; asked for again while the server cannot be reached.
export async function result(run) {
  for (let failures = 0; ; failures += 1) {
    try {
      return await json(requestPath(run));
    } catch (error) {
      if (isFinal(error) || error.isAnswer) throw error;
      await pause(Math.min(LONGEST_WAIT, 500 * 2 ** failures));
    }
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

export async function upload(file) {
  const announced = { content_type: file.type || "application/octet-stream", file_name: file.name };
  const { upload_url: to, file_url: url } = await json("storage/upload/initiate", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(announced),
  });
  await call(here(to), { method: "PUT", headers: { "content-type": announced.content_type }, body: file });
  return url;
}

// Where this server is for the programs of others, with whatever path a proxy put in front.
export const origin = base.href.replace(/\/$/, "");

// The server names itself by its public URL, which may be another name of this origin.
export const here = (url) => {
  const path = /\/(?:files|storage)\/.*$/.exec(url)?.[0];
  return path && !url.startsWith("data:") ? new URL(path.slice(1), base).href : url;
};
