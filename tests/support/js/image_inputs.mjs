// The output of test/copy for an image in each possible form. The SDK itself uploads a Blob in the input.
import { readFileSync } from "node:fs";

import { fal, printResult } from "./sdk.mjs";

const [path, hosted] = process.argv.slice(2);
const bytes = readFileSync(path);
const sources = {
  hosted,
  "data URI": `data:image/png;base64,${bytes.toString("base64")}`,
  uploaded: await fal.storage.upload(new File([bytes], "in.png", { type: "image/png" })),
  "a Blob": new Blob([bytes], { type: "image/png" }),
};
const outputs = {};
for (const [name, url] of Object.entries(sources)) {
  const input = { prompt: "", image_url: url, output_format: "png" };
  const result = await fal.subscribe("test/copy", { input, pollInterval: 20 });
  outputs[name] = result.data ?? result;
}
printResult(outputs);
