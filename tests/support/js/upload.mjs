// Uploads of each kind, and Blobs in the input of each call; every file is fetched from its URL.
import { fal, fetchFile, instantInput, printResult } from "./sdk.mjs";

const endpoint = "test/null";
const hello = new File(["Hello, World!"], "hello.txt", { type: "text/plain" });
const files = {
  named: hello,
  unnamed: new Blob(["Hello, World!"], { type: "image/png" }),
  untyped: new Blob(["Hello, World!"]),
  page: new File(["<script>alert(1)</script>"], "page.html", { type: "text/html" }),
  odd: new File(["Hello, World!"], 'März "🍎".txt', { type: "text/plain;charset=utf-8" }),
  empty: new File([], "empty.txt", { type: "text/plain" }),
};
const uploads = {};
for (const [name, file] of Object.entries(files)) {
  uploads[name] = await fetchFile(await fal.storage.upload(file));
}

// The model ignores a field that it does not know, but the SDK uploads its Blobs all the same.
const input = { ...instantInput, prompt: hello, further: { blobs: [new Blob(["x"], { type: "image/jpeg" })] } };
const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
await fal.queue.streamStatus(endpoint, { requestId }).then((stream) => stream.done());
const results = {
  run: await fal.run(endpoint, { input }),
  subscribe: await fal.subscribe(endpoint, { input, pollInterval: 20 }),
  submit: await fal.queue.result(endpoint, { requestId }),
};
const stream = await fal.stream(endpoint, { input: await fal.storage.transformInput(input) });
const outputs = { stream: await stream.done() };
for (const [name, result] of Object.entries(results)) {
  outputs[name] = result.data ?? result;
}
const inputs = {};
for (const [name, output] of Object.entries(outputs)) {
  inputs[name] = await fetchFile(output.prompt);
}
printResult({ uploads, inputs });
