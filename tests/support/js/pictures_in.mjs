// What test/copy answers to a picture that comes in each way; a Blob in the input is uploaded by the SDK itself.
import { readFileSync } from "node:fs";

import { fal, say } from "./sdk.mjs";

const [path, hosted] = process.argv.slice(2);
const bytes = readFileSync(path);
const ways = {
  hosted,
  "data URI": `data:image/png;base64,${bytes.toString("base64")}`,
  uploaded: await fal.storage.upload(new File([bytes], "in.png", { type: "image/png" })),
  "a Blob": new Blob([bytes], { type: "image/png" }),
};
const answers = {};
for (const [name, url] of Object.entries(ways)) {
  const input = { prompt: "", image_url: url, output_format: "png" };
  const result = await fal.subscribe("test/copy", { input, pollInterval: 20 });
  answers[name] = result.data ?? result;
}
say(answers);
