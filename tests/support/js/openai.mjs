// OpenAI's own package for Node: a generation, an edit with a mask, a stream and an error. Arguments: base URL, and the
// files of an image and a mask.
import { createReadStream } from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, image, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "local", maxRetries: 0 });
const common = { model: "gpt-image-1", prompt: "an apple" };

const generated = await client.images.generate({ ...common, size: "128x96", output_format: "webp" });
const edited = await client.images.edit({
  ...common,
  image: createReadStream(image),
  mask: await toFile(createReadStream(mask), "mask.png", { type: "image/png" }),
  n: 2,
});
const events = [];
const stream = await client.images.edit({ ...common, image: createReadStream(image), stream: true, partial_images: 1 });
for await (const event of stream) events.push(event);

let error = {};
try {
  await client.images.generate({ ...common, model: "unknown" });
} catch (raised) {
  error = { name: raised.constructor.name, code: raised.code, param: raised.param, requestID: raised.requestID };
}
console.log(JSON.stringify({ generated, edited, events, error, requestID: edited._request_id }));
