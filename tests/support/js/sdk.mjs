// The SDK named in $SDK, pointed at the server by the line in $POINTING, and what the scripts share.
import { createHash } from "node:crypto";
import { appendFileSync } from "node:fs";

const sdk = await import(process.env.SDK);
export const fal = sdk.fal ?? sdk;
Function("fal", process.env.POINTING)(fal);

const gate = process.argv[2];
const small = { image_size: { width: 64, height: 64 } };

// For test/null: painted at once. For test/gate: painted a step for each step(). For the real endpoint: soon.
export const atOnce = { prompt: "an apple", ...small };
export const gated = { prompt: gate, num_inference_steps: 3, ...small };
export const soon = { prompt: "an apple", seed: 7, num_inference_steps: 2, enable_safety_checker: false, ...small };

export const step = () => appendFileSync(gate, "x");

// The one object that the test reads: the last line of what is printed.
export const say = (value) => console.log(JSON.stringify(value));

export async function until(isTrue) {
  while (!(await isTrue())) {
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

// Poll the status of a request until it is `state`; returns that status.
export async function untilState(endpoint, requestId, state) {
  let update;
  await until(async () => {
    update = await fal.queue.status(endpoint, { requestId });
    return update.status === state;
  });
  return update;
}

// How a call failed, by the SDK's own classes; null when it did not.
export async function failureOf(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const { name, message, status, body, requestId, fieldErrors } = error;
    const isApiError = error instanceof sdk.ApiError;
    const isValidationError = error instanceof sdk.ValidationError;
    return { name, message, status, body, requestId, fieldErrors, isApiError, isValidationError };
  }
}

// Everything that a stream told until it was done, what its done() gave, and what `for await` gave.
export async function heard(stream, onEvent = () => {}) {
  const events = [];
  const iterated = [];
  stream.on("data", (event) => {
    events.push(event);
    onEvent();
  });
  for await (const event of stream) iterated.push(event);
  return { events, iterated, last: await stream.done() };
}

// What is found at a picture's URL.
export async function fetched(url) {
  const response = await fetch(url);
  const content = Buffer.from(await response.arrayBuffer());
  const sha256 = createHash("sha256").update(content).digest("hex");
  const magic = content.subarray(0, 4).toString("hex");
  return { url: url.slice(0, 100), status: response.status, type: response.headers.get("content-type"), sha256, magic };
}

// What a browser would see at a file's URL.
export async function shown(url, headers = {}) {
  const response = await fetch(url, { headers });
  const type = response.headers.get("content-type");
  const disposition = response.headers.get("content-disposition");
  return { url, status: response.status, type, disposition, text: await response.text() };
}
