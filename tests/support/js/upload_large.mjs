// A file above 90 MiB, which @fal-ai/client sends in parts of 10 MiB.
import { createHash } from "node:crypto";
import { fal, fetchImage, printResult } from "./sdk.mjs";

const mebibyte = 2 ** 20;
const content = Buffer.alloc(93 * mebibyte + 7);
for (let number = 0; number < 93; number++) {
  content.fill(`<${number}>`, number * mebibyte, (number + 1) * mebibyte);
}
const url = await fal.storage.upload(new File([content], "large.png", { type: "image/png" }));
printResult({ sent: createHash("sha256").update(content).digest("hex"), found: await fetchImage(url) });
