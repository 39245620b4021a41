// Records every host that a Node program looks up or connects to; load it with --require, before any other module.
// It also shortens the waits between a client's retries.
"use strict";

const dns = require("node:dns");
const { appendFileSync } = require("node:fs");
const net = require("node:net");

const record = (host) => appendFileSync(process.env.CANARY, `${host}\n`);

const { connect } = net.Socket.prototype;
net.Socket.prototype.connect = function (...args) {
  // Node itself calls this with one array of normalised arguments.
  const [options, host] = Array.isArray(args[0]) ? args[0] : args;
  if (typeof options !== "object") record(typeof host === "string" ? host : "localhost");
  else if (!options.path) record(options.host ?? "localhost");
  return connect.apply(this, args);
};

for (const module of [dns, dns.promises]) {
  for (const name of Object.keys(module).filter((key) => /^(lookup|resolve)/.test(key))) {
    const original = module[name];
    module[name] = function (host, ...rest) {
      record(host);
      return original.call(this, host, ...rest);
    };
  }
}

const { setTimeout: wait } = globalThis;
globalThis.setTimeout = (callback, milliseconds, ...rest) => wait(callback, Math.min(milliseconds, 1), ...rest);
