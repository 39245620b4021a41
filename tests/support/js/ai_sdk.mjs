// Vercel's AI SDK: generations, an edit with a mask, and an error. Arguments: base URL, and the files of an image and a mask.
import { readFileSync } from "node:fs";

import { createOpenAI } from "@ai-sdk/openai";
import { generateImage } from "ai";

const [baseURL, image, mask] = process.argv.slice(2);
const openai = createOpenAI({ baseURL, apiKey: "id:secret" });

async function generate(model, prompt, options = {}) {
  const { images } = await generateImage({ model: openai.image(model), prompt, maxRetries: 0, ...options });
  return images.map(({ base64, mediaType }) => ({ base64, mediaType }));
}

const generated = await generate("gpt-image-1", "a fish", { n: 2, size: "128x96" });
const older = await generate("dall-e-3", "a fish", { size: "128x96" });
const edited = await generate("gpt-image-1", { text: "a fish", images: [readFileSync(image)], mask: readFileSync(mask) });
let error = {};
try {
  await generate("unknown", "a fish");
} catch (raised) {
  error = { name: raised.name, message: raised.message, status: raised.statusCode };
}
console.log(JSON.stringify({ generated, older, edited, error }));
