// The playground in Firefox: `node firefox.mjs EXECUTABLE URL ENDPOINT PROMPT` prints what the page shows as JSON.

import puppeteer from "puppeteer-core";

const [executablePath, url, endpoint, prompt] = process.argv.slice(2);
// Pages see a system with a dark colour scheme.
const extraPrefsFirefox = { "layout.css.prefers-color-scheme.content-override": 0 };
const browser = await puppeteer.launch({ browser: "firefox", executablePath, headless: true, extraPrefsFirefox });
try {
  const page = await browser.newPage();
  const errors = [];
  const foreign = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.text().includes("Content-Security-Policy") && errors.push(message.text()));
  page.on("request", (request) => {
    const requested = new URL(request.url());
    if (requested.protocol.startsWith("http") && requested.origin !== new URL(url).origin) foreign.push(requested.href);
  });
  // page.waitForFunction evaluates text, which the page's content security policy forbids.
  const until = async (condition) => {
    while (!(await page.evaluate(condition))) await new Promise((resolve) => setTimeout(resolve, 50));
  };
  await page.goto(url);
  await page.waitForSelector("body[data-ready]");
  await page.select("#endpoint", endpoint);
  await page.waitForSelector(`body[data-ready='${endpoint}']`);
  await page.type("#field-prompt", prompt);
  await page.click("#run");
  const image = await page.waitForSelector("#runs figure img");
  const size = await image.evaluate((img) => img.decode().then(() => [img.naturalWidth, img.naturalHeight]));
  const state = await page.$eval("#runs .state", (node) => node.textContent);
  await page.reload();
  await page.waitForSelector("#runs figure img");
  const kept = await page.$eval("#runs .prompt", (node) => node.textContent);
  // Open the image, make variations, compare two of them, and repaint a part with the keyboard.
  await page.click("#runs a.open");
  await page.waitForSelector("dialog.lightbox .stage img");
  const shown = await page.$eval("dialog.lightbox .parameters", (list) => list.textContent);
  await page.keyboard.press("v");
  await until(() => document.querySelectorAll("#runs figure img").length === 4);
  await page.keyboard.press("c");
  await until(() => !document.querySelector("dialog.lightbox"));
  await (await page.$$("#runs a.open"))[1].click();
  await page.waitForSelector("dialog.compare img");
  const compared = await page.$eval("dialog.compare table", (table) => table.textContent);
  await page.keyboard.press("Escape");
  await until(() => !document.querySelector("dialog[open]"));
  await page.click("#runs a.open");
  await page.waitForSelector("dialog.lightbox .stage img");
  await page.keyboard.press("r");
  await page.waitForSelector("dialog.mask canvas");
  for (const key of [" ", "ArrowRight", "ArrowDown", "Enter"]) await page.keyboard.press(key);
  await until(() => document.querySelector("#field-mask_url")?.value.includes("/files/"));
  await page.click("#run");
  await until(() => document.querySelectorAll("#runs figure img").length === 5);
  const ground = await page.$eval("body", (body) => getComputedStyle(body).backgroundColor);
  // puppeteer sets the screen orientation together with the size, and Firefox ESR does not support that command.
  await page.setViewport({ width: 390, height: 844 }).catch((error) => {
    if (!error.message.includes("setScreenOrientationOverride")) throw error;
  });
  await page.evaluate(() => innerWidth === 390 || new Promise((resolve) => addEventListener("resize", resolve)));
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  console.log(JSON.stringify({ size, state, kept, shown, compared, errors, foreign, overflow, ground }));
} finally {
  await browser.close();
}
