// Notes every name that a Node program looks up and every address that it turns to: for --require, before all others.
// It also takes the waiting out of a client that tries again and again.
"use strict";

const dns = require("node:dns");
const { appendFileSync } = require("node:fs");
const net = require("node:net");

const note = (host) => appendFileSync(process.env.CANARY, `${host}\n`);

const { connect } = net.Socket.prototype;
net.Socket.prototype.connect = function (...given) {
  // Node itself passes on what it has made sense of as one array.
  const [options, host] = Array.isArray(given[0]) ? given[0] : given;
  if (typeof options !== "object") note(typeof host === "string" ? host : "localhost");
  else if (!options.path) note(options.host ?? "localhost");
  return connect.apply(this, given);
};

for (const module of [dns, dns.promises]) {
  for (const name of Object.keys(module).filter((key) => /^(lookup|resolve)/.test(key))) {
    const original = module[name];
    module[name] = function (host, ...rest) {
      note(host);
      return original.call(this, host, ...rest);
    };
  }
}

const { setTimeout: wait } = globalThis;
globalThis.setTimeout = (act, milliseconds, ...rest) => wait(act, Math.min(milliseconds, 1), ...rest);
