// Every way to open a TLS connection in Node: which certificate is found at the end of each.
import https from "node:https";
import http2 from "node:http2";
import tls, { connect } from "node:tls";

const host = process.argv[2];

const secured = (socket) =>
  new Promise((resolve, reject) => {
    socket.once("error", reject);
    socket.once("secureConnect", () => {
      const { remoteAddress, remotePort, servername } = socket;
      const issuer = socket.getPeerCertificate().issuer?.CN;
      socket.destroy();
      resolve({ remoteAddress, remotePort, servername, issuer });
    });
  });

const requested = (options) =>
  new Promise((resolve, reject) => {
    const request = https.get(options, (response) => resolve({ status: response.statusCode, ...response.resume() }));
    request.once("error", reject);
  });

const ways = {
  "tls.connect(options)": () => secured(tls.connect({ host, port: 443, servername: host })),
  "tls.connect(options, listener)": () => secured(tls.connect({ host, port: 443, servername: host }, () => {})),
  "tls.connect(port, host)": () => secured(tls.connect(443, host)),
  "tls.connect(port, host, listener)": () => secured(tls.connect(443, host, () => {})),
  "tls.connect(port, host, options)": () => secured(tls.connect(443, host, { servername: host })),
  "tls.connect(port, host, options, listener)": () => secured(tls.connect(443, host, { servername: host }, () => {})),
  "tls.connect(port, options)": () => secured(tls.connect(443, { host, servername: host })),
  "tls.connect(port, options, listener)": () => secured(tls.connect(443, { host, servername: host }, () => {})),
  "import { connect }": () => secured(connect({ host, port: 443, servername: host })),
  "https.get(url)": async () => ({ status: (await requested(`https://${host}/health`)).status }),
  "https.get(options)": async () => ({ status: (await requested({ host, path: "/health", agent: false })).status }),
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

const said = {};
for (const [name, way] of Object.entries(ways)) {
  said[name] = await way().catch((error) => ({ failed: String(error) }));
}
console.log(JSON.stringify(said));
