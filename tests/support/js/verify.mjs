// An independent webhook receiver: prints which signatures are valid, with Node's own crypto and nothing else.
// Reads {headers, body (base64), now, secret, jwks or jwksUrl} as JSON.
import { createHash, createHmac, createPublicKey, timingSafeEqual, verify } from "node:crypto";
import { readFileSync } from "node:fs";

const { headers, body: text, now, secret, jwks, jwksUrl } = JSON.parse(readFileSync(0, "utf-8"));
const body = Buffer.from(text, "base64");
const { keys } = jwks ?? (await (await fetch(jwksUrl)).json());
const published = keys.map((key) => createPublicKey({ key, format: "jwk" }));

const isRecent = (timestamp) => Math.abs((now ?? Date.now() / 1000) - Number(timestamp)) <= 300;
const isSigned = (message, signature) => published.some((key) => verify(null, message, key, signature));

function fal() {
  const names = ["request-id", "user-id", "timestamp", "signature"];
  const [requestId, userId, timestamp, signature] = names.map((name) => headers[`x-fal-webhook-${name}`]);
  const digest = createHash("sha256").update(body).digest("hex");
  const message = Buffer.from([requestId, userId, timestamp, digest].join("\n"), "utf-8");
  return isRecent(timestamp) && isSigned(message, Buffer.from(signature, "hex"));
}

function standard(version, isValid) {
  const { "webhook-id": id, "webhook-timestamp": timestamp, "webhook-signature": signatures } = headers;
  const message = Buffer.concat([Buffer.from(`${id}.${timestamp}.`), body]);
  const candidates = signatures.split(" ").filter((signature) => signature.startsWith(`${version},`));
  const decoded = candidates.map((signature) => Buffer.from(signature.split(",")[1], "base64"));
  return isRecent(timestamp) && decoded.some((signature) => isValid(message, signature));
}

function isHashed(message, signature) {
  const key = Buffer.from(secret.replace("whsec_", ""), "base64");
  const expected = createHmac("sha256", key).update(message).digest();
  return expected.length === signature.length && timingSafeEqual(expected, signature);
}

console.log(JSON.stringify({ fal: fal(), v1: standard("v1", isHashed), v1a: standard("v1a", isSigned) }));
