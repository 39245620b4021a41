// The SDK named in $SDK, pointed at the server by the line in $POINTING, and functions that the scripts share.
import { createHash } from "node:crypto";
import { appendFileSync } from "node:fs";

const sdk = await import(process.env.SDK);
export const fal = sdk.fal ?? sdk;
Function("fal", process.env.POINTING)(fal);

const gate = process.argv[2];
const small = { image_size: { width: 64, height: 64 } };

// Inputs: for test/null, which is done at once; for test/gate, which takes a step for each releaseStep(); and for the
// real endpoint, as fast as it can be.
export const instantInput = { prompt: "an apple", ...small };
export const gatedInput = { prompt: gate, num_inference_steps: 3, ...small };
export const fastInput = {
  prompt: "an apple",
  seed: 7,
  num_inference_steps: 2,
  enable_safety_checker: false,
  ...small,
};

export const releaseStep = () => appendFileSync(gate, "x");

// Print the one object that the test reads: it must be the last line of the output.
export const printResult = (value) => console.log(JSON.stringify(value));

export async function waitUntil(isTrue) {
  while (!(await isTrue())) {
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

// Poll the status of a request until it is `state`; return that status.
export async function waitForState(endpoint, requestId, state) {
  let update;
  await waitUntil(async () => {
    update = await fal.queue.status(endpoint, { requestId });
    return update.status === state;
  });
  return update;
}

// Return the error of a failed call, with the SDK's own fields and classes; null if the call succeeded.
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

// Read a stream until it is done; return the events of its listener, those of `for await`, and the value of done().
export async function collectEvents(stream, onEvent = () => {}) {
  const events = [];
  const iterated = [];
  stream.on("data", (event) => {
    events.push(event);
    onEvent();
  });
  for await (const event of stream) iterated.push(event);
  return { events, iterated, last: await stream.done() };
}

// Fetch an image's URL; return the response's status and type, and the digest and first bytes of its content.
export async function fetchImage(url) {
  const response = await fetch(url);
  const content = Buffer.from(await response.arrayBuffer());
  const sha256 = createHash("sha256").update(content).digest("hex");
  const magic = content.subarray(0, 4).toString("hex");
  return { url: url.slice(0, 100), status: response.status, type: response.headers.get("content-type"), sha256, magic };
}

// Fetch a file's URL; return the parts of the response that matter to a browser.
export async function fetchFile(url, headers = {}) {
  const response = await fetch(url, { headers });
  const type = response.headers.get("content-type");
  const disposition = response.headers.get("content-disposition");
  return { url, status: response.status, type, disposition, text: await response.text() };
}
