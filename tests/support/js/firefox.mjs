// The playground in Firefox: node firefox.mjs EXECUTABLE URL ENDPOINT PROMPT. Says what was seen, as JSON.

import puppeteer from "puppeteer-core";

const [executablePath, url, endpoint, prompt] = process.argv.slice(2);
// For somebody whose system is dark.
const extraPrefsFirefox = { "layout.css.prefers-color-scheme.content-override": 0 };
const browser = await puppeteer.launch({ browser: "firefox", executablePath, headless: true, extraPrefsFirefox });
try {
  const page = await browser.newPage();
  const errors = [];
  const foreign = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (said) => said.text().includes("Content-Security-Policy") && errors.push(said.text()));
  page.on("request", (request) => {
    const asked = new URL(request.url());
    if (asked.protocol.startsWith("http") && asked.origin !== new URL(url).origin) foreign.push(asked.href);
  });
  await page.goto(url);
  await page.waitForSelector("body[data-ready]");
  await page.select("#endpoint", endpoint);
  await page.waitForSelector(`body[data-ready='${endpoint}']`);
  await page.type("#field-prompt", prompt);
  await page.click("#run");
  const picture = await page.waitForSelector("#runs figure img");
  const size = await picture.evaluate((image) => image.decode().then(() => [image.naturalWidth, image.naturalHeight]));
  const state = await page.$eval("#runs .state", (node) => node.textContent);
  await page.reload();
  await page.waitForSelector("#runs figure img");
  const kept = await page.$eval("#runs .prompt", (node) => node.textContent);
  const ground = await page.$eval("body", (body) => getComputedStyle(body).backgroundColor);
  // Along with the size puppeteer says which way the screen is held, which Firefox ESR does not know.
  await page.setViewport({ width: 390, height: 844 }).catch((error) => {
    if (!error.message.includes("setScreenOrientationOverride")) throw error;
  });
  await page.evaluate(() => innerWidth === 390 || new Promise((resize) => addEventListener("resize", resize)));
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  console.log(JSON.stringify({ size, state, kept, errors, foreign, overflow, ground }));
} finally {
  await browser.close();
}
