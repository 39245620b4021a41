// Realtime with the SDK's own token: two pictures in one session, then an input that is refused. The SDK says
// wss://fal.run whatever it was told, so its WebSocket takes it to the server in argv[2] instead.
import WebSocket from "ws";

import { atOnce, fal, say } from "./sdk.mjs";

const urls = [];
globalThis.WebSocket = class extends WebSocket {
  constructor(url) {
    urls.push(url);
    super(url.replace("wss://fal.run", process.argv[2]));
  }
};

const results = [];
const errors = [];
let heard = () => {};

const connection = fal.realtime.connect("test/null", {
  maxBuffering: 5,
  throttleInterval: 0,
  onResult: (result) => {
    results.push(result);
    heard(result);
  },
  onError: (error) => {
    errors.push(String(error));
    heard(error.body);
  },
});

const sent = (input, isLast) =>
  new Promise((resolve) => {
    heard = (answer) => isLast(answer) && resolve(answer);
    connection.send(input);
  });

await sent({ ...atOnce, seed: 7 }, (answer) => answer.prompt === "an apple");
await sent({ ...atOnce, prompt: "a pear" }, (answer) => answer.prompt === "a pear");
const before = [...errors];
// The older SDK knows no error messages.
const refused = process.env.SDK === "@fal-ai/client" ? await sent({ prompt: 5 }, (answer) => answer?.error) : null;
say({ urls, results, errors: before, refused });
process.exit(0);
