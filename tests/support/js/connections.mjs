// Each way to open a TLS connection in Node; prints the issuer of the certificate and other facts of each connection.
import https from "node:https";
import http2 from "node:http2";
import tls, { connect } from "node:tls";

const host = process.argv[2];

const inspect = (socket) =>
  new Promise((resolve, reject) => {
    socket.once("error", reject);
    socket.once("secureConnect", () => {
      const { remoteAddress, remotePort, servername } = socket;
      const issuer = socket.getPeerCertificate().issuer?.CN;
      socket.destroy();
      resolve({ remoteAddress, remotePort, servername, issuer });
    });
  });

const get = (options) =>
  new Promise((resolve, reject) => {
    const request = https.get(options, (response) => resolve({ status: response.statusCode, ...response.resume() }));
    request.once("error", reject);
  });

const ways = {
  "tls.connect(options)": () => inspect(tls.connect({ host, port: 443, servername: host })),
  "tls.connect(options, listener)": () => inspect(tls.connect({ host, port: 443, servername: host }, () => {})),
  "tls.connect(port, host)": () => inspect(tls.connect(443, host)),
  "tls.connect(port, host, listener)": () => inspect(tls.connect(443, host, () => {})),
  "tls.connect(port, host, options)": () => inspect(tls.connect(443, host, { servername: host })),
  "tls.connect(port, host, options, listener)": () => inspect(tls.connect(443, host, { servername: host }, () => {})),
  "tls.connect(port, options)": () => inspect(tls.connect(443, { host, servername: host })),
  "tls.connect(port, options, listener)": () => inspect(tls.connect(443, { host, servername: host }, () => {})),
  "import { connect }": () => inspect(connect({ host, port: 443, servername: host })),
  "https.get(url)": async () => ({ status: (await get(`https://${host}/health`)).status }),
  "https.get(options)": async () => ({ status: (await get({ host, path: "/health", agent: false })).status }),
  "fetch(url)": async () => ({ status: (await fetch(`https://${host}/health`)).status }),
  "http2.connect(url)": () =>
    new Promise((resolve, reject) => {
      const session = http2.connect(`https://${host}`);
      session.once("error", reject);
      session.socket.once("secureConnect", () => {
        const { remotePort } = session.socket;
        session.destroy();
        resolve({ remotePort });
      });
    }),
};

const results = {};
for (const [name, connectOnce] of Object.entries(ways)) {
  results[name] = await connectOnce().catch((error) => ({ failed: String(error) }));
}
console.log(JSON.stringify(results));
