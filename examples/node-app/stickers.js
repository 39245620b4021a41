// The sticker shop: draws with fal's client and with OpenAI's API, and handles everything that can go wrong.
import { setTimeout as sleep } from "node:timers/promises";
import { ApiError, fal } from "@fal-ai/client";

const ENDPOINT = "fal-ai/flux/schnell";
const input = (prompt) => ({ prompt, image_size: { width: 128, height: 128 } });

// An image that the customer must describe in other words.
export class Refused extends Error {}
// An image that cannot be drawn now.
export class TryLater extends Error {}

export const orders = new Map();
export const sales = { count: 0 };

// Draw a sticker; return its URL.
export async function draw(prompt) {
  let result;
  try {
    result = await subscribe(prompt);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 422) throw new Refused(`Please change: ${error.body.detail.map(({ loc }) => loc.at(-1))}`);
    if (error.status === 504) throw new TryLater("Too many people draw stickers now");
    if (error.status === 499) throw new TryLater("This sticker was stopped");
    throw error;
  }
  if (result.data.has_nsfw_concepts.includes(true)) throw new Refused("This sticker would not suit everyone");
  return result.data.images[0].url;
}

// Draw; try once more after an error of the server.
async function subscribe(prompt) {
  try {
    return await fal.run(ENDPOINT, { input: input(prompt) });
  } catch (error) {
    if (error.status !== 500) throw error;
  }
  return await fal.run(ENDPOINT, { input: input(prompt) });
}

// Draw a sticker, but cancel it after so many milliseconds.
export async function drawSoon(prompt, milliseconds) {
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input: input(prompt) });
  const deadline = Date.now() + milliseconds;
  while ((await fal.queue.status(ENDPOINT, { requestId })).status !== "COMPLETED") {
    if (Date.now() > deadline) {
      await fal.queue.cancel(ENDPOINT, { requestId });
      throw new TryLater("This takes too long");
    }
    await sleep(50);
  }
  return (await fal.queue.result(ENDPOINT, { requestId })).data.images[0].url;
}

// Draw a logo with OpenAI's API; when the limit is reached, wait as long as the server says.
export async function drawLogo(name) {
  const url = `${process.env.OPENAI_BASE_URL ?? "https://api.openai.com/v1"}/images/generations`;
  const headers = { authorization: `Bearer ${process.env.OPENAI_API_KEY}` };
  const body = JSON.stringify({ prompt: `a logo: ${name}`, size: "256x256", response_format: "url" });
  for (let left = 3; left > 0; left--) {
    const response = await fetch(url, { method: "POST", headers, body });
    if (response.ok) return (await response.json()).data[0].url;
    if (response.status !== 429) throw new Error(await response.text());
    await sleep(1000 * Number(response.headers.get("retry-after")));
  }
  throw new TryLater("Too many logos");
}

// Order a sticker, which fal sends to our webhook.
export async function order(prompt, webhookUrl) {
  const { request_id: requestId } = await fal.queue.submit(ENDPOINT, { input: input(prompt), webhookUrl });
  return entry(requestId);
}

// Return what the page of a waiting order says.
export async function place({ requestId }) {
  const status = await fal.queue.status(ENDPOINT, { requestId });
  return status.status === "IN_QUEUE" ? `You are number ${status.queue_position + 1}` : "Your turn";
}

// Return an order; ask fal for the result if the webhook has not come yet.
export async function lookUp(requestId) {
  const found = entry(requestId);
  if (found.status === "waiting" && (await fal.queue.status(ENDPOINT, { requestId })).status === "COMPLETED") {
    deliver(requestId, (await fal.queue.result(ENDPOINT, { requestId })).data);
  }
  return found;
}

// Complete an order, from the webhook or from lookUp; do nothing if it is complete already.
export function deliver(requestId, output) {
  const found = entry(requestId);
  if (found.status !== "waiting") return;
  Object.assign(found, { status: "done", imageUrl: output.images[0].url });
  sales.count += 1;
}

function entry(requestId) {
  if (!orders.has(requestId)) orders.set(requestId, { requestId, status: "waiting" });
  return orders.get(requestId);
}
