// Files and images that only their owner may read: each is fetched without the key and with it.
import { fal, fetchFile, instantInput, printResult } from "./sdk.mjs";

const lifecycle = { expiresIn: "1h", initialAcl: { default: "forbid", rules: [{ user: "x", decision: "allow" }] } };
const file = new File(["Hello, World!"], "hello.txt", { type: "text/plain" });
const result = await fal.run("test/null", { input: instantInput, storageSettings: lifecycle });
const urls = {
  open: await fal.storage.upload(file),
  upload: await fal.storage.upload(file, { lifecycle }),
  image: result.data.images[0].url,
};
const found = {};
for (const [name, url] of Object.entries(urls)) {
  const key = { authorization: `Key ${process.env.FAL_KEY}` };
  found[name] = { stranger: (await fetchFile(url)).status, owner: (await fetchFile(url, key)).status };
}
printResult(found);
