// Realtime with the SDK's own token: two images in one session, then an input that is refused. The SDK connects to
// wss://fal.run whatever its configuration, so this WebSocket replaces that host by the server in argv[2].
import WebSocket from "ws";

import { fal, instantInput, printResult } from "./sdk.mjs";

const urls = [];
globalThis.WebSocket = class extends WebSocket {
  constructor(url) {
    urls.push(url);
    super(url.replace("wss://fal.run", process.argv[2]));
  }
};

const results = [];
const errors = [];
let onAnswer = () => {};

const connection = fal.realtime.connect("test/null", {
  maxBuffering: 5,
  throttleInterval: 0,
  onResult: (result) => {
    results.push(result);
    onAnswer(result);
  },
  onError: (error) => {
    errors.push(String(error));
    onAnswer(error.body);
  },
});

const send = (input, isLast) =>
  new Promise((resolve) => {
    onAnswer = (answer) => isLast(answer) && resolve(answer);
    connection.send(input);
  });

await send({ ...instantInput, seed: 7 }, (answer) => answer.prompt === "an apple");
await send({ ...instantInput, prompt: "a pear" }, (answer) => answer.prompt === "a pear");
const before = [...errors];
// The older SDK does not support error messages.
const refused = process.env.SDK === "@fal-ai/client" ? await send({ prompt: 5 }, (answer) => answer?.error) : null;
printResult({ urls, results, errors: before, refused });
process.exit(0);
