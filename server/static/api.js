// A client of this server's fal-compatible API: the queue, its events and uploads. All requests go to this origin.

const base = new URL(".", document.baseURI);
let key = sessionStorage.getItem("key") ?? "";

export const setKey = (value) => sessionStorage.setItem("key", (key = value));

export class ApiError extends Error {
  constructor(status, body) {
    const entries = Array.isArray(body?.detail) ? body.detail : [];
    super(entries[0]?.msg ?? (typeof body?.detail === "string" ? body.detail : `The server returned status ${status}.`));
    this.status = status;
    this.body = body;
    // Whether the error comes from this server. A proxy in front of it also sends statuses of 500 and above.
    this.isFromServer = body?.detail !== undefined;
    // The invalid fields and their messages: [["prompt", "Field required"], ...].
    this.problems = entries.map(({ loc, msg }) => [loc.slice(1).join("."), msg]);
  }
}

async function call(path, { headers = {}, ...options } = {}) {
  const authorized = key ? { authorization: `Key ${key}`, ...headers } : headers;
  const response = await fetch(new URL(path, base), { ...options, headers: authorized });
  if (!response.ok) {
    throw new ApiError(response.status, await response.json().catch(() => null));
  }
  return response;
}

const json = async (path, options) => (await call(path, options)).json();
const app = (endpoint) => endpoint.split("/").slice(0, 2).join("/");
const requestPath = ({ endpoint, requestId }) => `queue/${app(endpoint)}/requests/${requestId}`;

export const status = () => json("status.json");
export const playgroundConfig = () => json("playground.json");
// The mean times of a step since the server's start: { steps: [{ size, acceleration, count, seconds }] }.
export const stepTimes = () => json("playground/steps.json");
export const openApiOf = (endpoint) =>
  json(`api/openapi/queue/openapi.json?endpoint_id=${encodeURIComponent(endpoint)}`);

// A page of this key's requests, newest first, with their inputs and outputs.
export const listRequests = (cursor) =>
  json(`v1/models/requests/by-endpoint?${new URLSearchParams({
    expand: "payloads", limit: 20, start: "1970-01-01", ...(cursor && { cursor }),
  })}`);

export const submit = (endpoint, input, priority = "normal") =>
  json(`queue/${endpoint}`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-fal-queue-priority": priority },
    body: JSON.stringify(input),
  });

// Resolve also for the statuses that say that there is nothing left to do.
const unless = (...statuses) => (error) => (statuses.includes(error.status) ? null : Promise.reject(error));

// A request that has ended already counts as cancelled, and one that the server no longer stores as deleted.
export const cancel = (request) => json(`${requestPath(request)}/cancel`, { method: "PUT" }).catch(unless(400, 404));
export const deleteRequest = (request) => call(requestPath(request), { method: "DELETE" }).catch(unless(404));

// A browser opens six connections to one server, shared by all its tabs. The streams leave some of them for images and
// other requests.
const MAX_STREAMS = 3;
const POLL_INTERVAL_MS = 1500;
// The more requests are polled, the less often each is, so that the page sends at most about five requests a second.
const POLL_INTERVAL_OF_EACH_MS = 200;
const MAX_RETRY_DELAY_MS = 15_000;
let streams = 0;
let polls = 0;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const retryDelay = (failures) => Math.min(MAX_RETRY_DELAY_MS, 500 * 2 ** failures);
// While the server restarts, a proxy in front of it responds with 5xx, so such an error is not final.
const isFinal = (error) => error instanceof ApiError && error.status < 500;

// Yield each status of a request until it completes; `logs` holds all logs so far. Streams the status, or polls it when
// too many streams are open. When the connection breaks, as it does when the server restarts, yields the status
// UNREACHABLE and starts again.
export async function* statuses(request) {
  for (let failures = 0; ; failures += 1) {
    const isStreamed = streams < MAX_STREAMS;
    if (isStreamed) streams += 1;
    try {
      for await (const status of isStreamed ? streamed(request) : polled(request)) {
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
    await pause(retryDelay(failures));
  }
}

async function* streamed(request) {
  const response = await call(`${requestPath(request)}/status/stream?logs=1&previews=1`);
  const logs = [];
  for await (const status of events(response.body)) {
    logs.push(...(status.logs ?? []));
    yield { ...status, logs };
  }
}

// Poll until another stream may be opened.
async function* polled(request) {
  polls += 1;
  try {
    while (streams >= MAX_STREAMS) {
      yield await json(`${requestPath(request)}/status?logs=1`);
      await pause(Math.max(POLL_INTERVAL_MS, polls * POLL_INTERVAL_OF_EACH_MS));
    }
  } finally {
    polls -= 1;
  }
}

// Return the result or throw the error that the request ended with. Retries while the server is unreachable.
export async function result(request) {
  for (let failures = 0; ; failures += 1) {
    try {
      return await json(requestPath(request));
    } catch (error) {
      if (isFinal(error) || error.isFromServer) throw error;
      await pause(retryDelay(failures));
    }
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (buffer + value).split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

export async function upload(file) {
  const metadata = { content_type: file.type || "application/octet-stream", file_name: file.name };
  const { upload_url: uploadUrl, file_url: fileUrl } = await json("storage/upload/initiate", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(metadata),
  });
  await call(localUrl(uploadUrl), { method: "PUT", headers: { "content-type": metadata.content_type }, body: file });
  return fileUrl;
}

// The URL of this server for code samples, including any path that a proxy adds.
export const origin = base.href.replace(/\/$/, "");

// The part of a URL that names a file in the server's store, or an upload to it.
const ownPath = (url) => (url.startsWith("data:") ? null : /\/(?:files\/[0-9a-f]{32}\.\w+|storage\/upload\/.*)$/.exec(url)?.[0]);
export const isOwnFile = (url) => Boolean(ownPath(url));

// Map a file's URL to this origin: the server builds URLs from its public URL, which may name this origin differently.
export const localUrl = (url) => (isOwnFile(url) ? new URL(ownPath(url).slice(1), base).href : url);
