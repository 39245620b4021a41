// The code of a web page: @fal-ai/client in a browser, with a proxyUrl and no key.
import { fal } from "@fal-ai/client";

const input = { prompt: "a red apple", seed: 7, num_inference_steps: 3, image_size: { width: 64, height: 64 } };

// Whether the page can show the image in an <img>.
const isShown = (url) =>
  new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image.naturalWidth === 64);
    image.onerror = () => resolve(false);
    image.src = url;
  });

async function generateStream(endpoint) {
  const stream = await fal.stream(endpoint, { input });
  const events = [];
  for await (const event of stream) events.push(event);
  return { requestId: stream.requestId, events, output: await stream.done() };
}

async function sendInvalid(endpoint) {
  try {
    await fal.run(endpoint, { input: { prompt: 5 } });
    return null;
  } catch (error) {
    return { status: error.status, body: error.body, requestId: error.requestId };
  }
}

window.paint = async (proxyUrl, endpoint) => {
  fal.config({ proxyUrl });
  const updates = [];
  const subscribed = await fal.subscribe(endpoint, {
    input,
    logs: true,
    onQueueUpdate: (update) => updates.push(update.status),
  });
  const followed = await fal.subscribe(endpoint, { input, mode: "streaming" });
  const ran = await fal.run(endpoint, { input });
  const uploaded = await fal.storage.upload(new File(["hello"], "hello.txt", { type: "text/plain" }));
  return {
    updates,
    subscribed,
    followed,
    ran,
    streamed: await generateStream(endpoint),
    refused: await sendInvalid(endpoint),
    uploaded,
    // Fetched by the page itself, across origins.
    found: await (await fetch(uploaded)).text(),
    isShown: await isShown(subscribed.data.images[0].url),
  };
};
document.title = "ready";
