// Tests of the sticker shop. Each makes the server misbehave in one way, and checks that the shop copes.
import assert from "node:assert/strict";
import { after, before, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { Refused, TryLater, draw, drawLogo, drawSoon, lookUp, order, place, sales } from "../stickers.js";
import { received, server } from "../web.js";

// The controls of the server that `flux-server run --testing` started.
async function control(path, body) {
  const headers = { authorization: `Key ${process.env.FAL_KEY}` };
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const response = await fetch(`${process.env.FAL_SERVER_URL}/testing/${path}`, options);
  assert.ok(response.ok, await response.clone().text());
  return await response.json();
}
const next = (fault) => control("next", fault);
const requests = async () => (await control("requests")).requests;

async function waitUntil(condition) {
  for (const deadline = Date.now() + 60_000; !(await condition()); await sleep(20)) assert.ok(Date.now() < deadline);
}

let webhookUrl;
before(async () => {
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  webhookUrl = `http://127.0.0.1:${server.address().port}/`;
});
after(() => server.close());
beforeEach(() => control("reset", {}));

test("a sticker", async () => {
  const image = await fetch(await draw("a red apple"));
  assert.equal(image.headers.get("content-type"), "image/jpeg");
  const [request] = await requests();
  assert.equal(request.endpoint, "fal-ai/flux/schnell");
  assert.equal(request.input.prompt, "a red apple");
});

test("an invalid prompt", async () => {
  await next({ status: 422, field: "prompt" });
  await assert.rejects(draw("a red apple"), new Refused("Please change: prompt"));
});

test("an unsafe image", async () => {
  await next({ flag: true });
  await assert.rejects(draw("a red apple"), new Refused("This sticker would not suit everyone"));
});

test("an error of the server", async () => {
  await next({ status: 500 });
  assert.ok(await draw("a red apple"));
  assert.equal((await requests()).length, 2);
});

test("a timeout", async () => {
  await next({ status: 504 });
  await assert.rejects(draw("a red apple"), new TryLater("Too many people draw stickers now"));
});

test("a cancelled request", async () => {
  await next({ status: 499 });
  await assert.rejects(draw("a red apple"), new TryLater("This sticker was stopped"));
});

test("a slow sticker is cancelled", async () => {
  await next({ delay: 600 });
  await assert.rejects(drawSoon("a red apple", 1000), new TryLater("This takes too long"));
  assert.ok((await requests())[0].is_cancelled);
});

test("a limit is respected", async () => {
  await next({ status: 429, retry_after: 1, times: 2 });
  assert.ok(await drawLogo("flux"));
  const [first, second, third] = await requests();
  assert.deepEqual([first.refused, second.refused, third.refused], [429, 429, null]);
  assert.ok(third.submitted_at - first.submitted_at > 1.9);
});

test("the place in the queue", async () => {
  await next({ hold: true, queue_position: 3 });
  const ordered = await order("a red apple", webhookUrl);
  assert.equal(await place(ordered), "You are number 4");
  await control("release", {});
  await waitUntil(() => ordered.status === "done");
});

test("a webhook that comes twice", async () => {
  await next({ webhook_copies: 2 });
  const sold = sales.count;
  const { requestId } = await order("a red apple", webhookUrl);
  await waitUntil(() => received.filter((id) => id === requestId).length === 2);
  assert.equal(sales.count, sold + 1);
});

test("a webhook that comes late", async () => {
  await next({ webhook_delay: 600 });
  const { requestId } = await order("a red apple", webhookUrl);
  await waitUntil(async () => (await requests())[0].status === "COMPLETED");
  assert.equal((await lookUp(requestId)).status, "done");
});
