// The server, as any client of fal's sees it: the queue, its events, uploads. Everything goes to this origin.

const base = new URL(".", document.baseURI);
let key = sessionStorage.getItem("key") ?? "";

export const setKey = (given) => sessionStorage.setItem("key", (key = given));

export class Refused extends Error {
  constructor(status, body) {
    const entries = Array.isArray(body?.detail) ? body.detail : [];
    super(entries[0]?.msg ?? (typeof body?.detail === "string" ? body.detail : `The server answered ${status}.`));
    this.status = status;
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

export const result = (run) => json(requestPath(run));
export const cancel = (run) => json(`${requestPath(run)}/cancel`, { method: "PUT" }).catch(() => null);

// Each status of a request until it is done; begins anew where the connection breaks, as it does at a restart.
export async function* statuses(run) {
  for (;;) {
    try {
      const response = await call(`${requestPath(run)}/status/stream?logs=1&previews=1`);
      for await (const status of events(response.body)) {
        yield status;
        if (status.status === "COMPLETED") return;
      }
    } catch (error) {
      if (error instanceof Refused) throw error;
    }
    yield { status: "UNREACHABLE" };
    await new Promise((resolve) => setTimeout(resolve, 1000));
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

// The server names itself by its public URL, which may be another name of this origin.
export const here = (url) => (url.startsWith("data:") ? url : new URL(new URL(url).pathname.slice(1), base).href);
