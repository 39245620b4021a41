// One image in full, with its parameters, the keys to look through the others, and everything that can be done with it.

import { announce, blurButton, button, element, iconButton, loadDialogStyle, modal } from "./elements.js";
import * as favourites from "./favourites.js";
import * as imageFiles from "./image_files.js";
import { labelOf } from "./labels.js";
import { parameterList } from "./parameters.js";
import * as targets from "./targets.js";
import { seedOf } from "./variations.js";

const KEYS = [
  ["← →", "Previous and next image"], ["Z", "Zoom to pixels"], ["F", "Favourite"], ["C", "Compare"], ["V", "3 variations"],
  ["R", "Repaint a part"], ["D", "Download"], ["S", "Use these settings"], ["Del", "Delete"], ["Esc", "Close"],
];

// Open a result. `shown()` returns the results in the order of the grid; results.js describes `page` and `actions`.
export async function open(first, { shown, page, actions }) {
  await loadDialogStyle();
  let result = first;
  const stage = element("div", { className: "stage", tabIndex: 0 });
  stage.setAttribute("role", "group");
  const aside = element("aside", { ariaLabel: "Parameters and actions" });
  const count = element("span", { className: "count" });
  count.setAttribute("role", "status");
  const move = (step) => {
    const results = shown();
    const next = results[(results.indexOf(result) + step + results.length) % results.length];
    if (next) show(next);
  };
  const dialog = modal("lightbox", "Image", element("div", { className: "view" }, stage, aside));
  dialog.querySelector("header button").before(count, iconButton("previous", "Previous image", () => move(-1)), iconButton("next", "Next image", () => move(1)));
  const close = () => dialog.close();
  const commands = commandsFor({ current: () => result, close, move, show, shown, page, actions, stage });

  function show(next) {
    result = next;
    const results = shown();
    count.textContent = `${results.indexOf(result) + 1} of ${results.length}`;
    const image = showImage(stage, result);
    const flagged = result.isFlagged ? [element("p", {}, "Flagged by the safety checker. ", blurButton(image))] : [];
    const focused = aside.contains(document.activeElement) ? document.activeElement.textContent : null;
    aside.replaceChildren(...flagged, buttons(result, commands, page), sendForm(result, page, close), parameterList(result), keyList());
    if (focused !== null) ([...aside.querySelectorAll("button")].find((each) => each.textContent === focused) ?? stage).focus();
    stage.setAttribute("aria-label", `Image ${count.textContent}. Press Z to see its pixels.`);
  }

  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input, textarea")) return;
    const command = commands[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!command) return;
    event.preventDefault();
    command();
  });
  stage.addEventListener("click", () => toggleZoom(stage));
  show(first);
  stage.focus();
}

function showImage(stage, { run, url, width, height, isFlagged }) {
  const image = element("img", { src: url, width, height, alt: run.request.input.prompt ?? "", draggable: true, className: isFlagged ? "flagged" : "" });
  image.addEventListener("dragstart", (event) => imageFiles.setDragged(event.dataTransfer, url));
  stage.dataset.zoom = "";
  stage.style.setProperty("--ratio", width && height ? width / height : 1);
  stage.replaceChildren(image);
  return image;
}

// Show the image fitted to the window, then each of its pixels as one pixel of the screen, then as 4 by 4.
function toggleZoom(stage) {
  const zoom = { "": "1", 1: "4", 4: "" }[stage.dataset.zoom ?? ""];
  const image = stage.firstElementChild;
  stage.dataset.zoom = zoom;
  image.style.width = zoom ? `${(zoom * image.naturalWidth) / devicePixelRatio}px` : "";
  stage.scrollLeft = (stage.scrollWidth - stage.clientWidth) / 2;
  stage.scrollTop = (stage.scrollHeight - stage.clientHeight) / 2;
  announce(zoom ? `Shown at ${100 * zoom} %. The arrow keys scroll.` : "Fitted to the window.");
}

// What each key does. The buttons call the same functions.
function commandsFor({ current, close, move, show, shown, page, actions, stage }) {
  const settings = () => { close(); actions.useSettings(current().run); };
  const remove = async () => {
    const results = shown();
    const next = results.filter(({ run }) => run !== current().run)[0];
    if (!(await current().run.delete())) return;
    if (next) show(next);
    else close();
  };
  const turn = (step) => () => {
    if (stage.dataset.zoom) stage.scrollBy(step * 80, 0);
    else move(step);
  };
  return {
    ArrowLeft: turn(-1), ArrowRight: turn(1), Delete: remove, z: () => toggleZoom(stage), s: settings,
    f: () => { actions.toggleFavourite(current()); show(current()); },
    c: () => { close(); actions.compare(current()); },
    v: () => actions.vary(current().run, current().index),
    d: () => stage.closest("dialog").querySelector("a[download]").click(),
    strength: () => actions.varyStrength(current().run, current().index),
    code: () => { close(); page.showCodeOf(current().run.request.endpoint, current().run.settings()); },
    input: () => { close(); actions.useAsInput(current()); },
    r: () => { close(); page.repaint(current().url, current().run.request); },
    copy: () => imageFiles.copy(current().url).then(() => announce("Copied."), (error) => announce(error.message)),
    copyLink: () => imageFiles.copyText(current().url).then(() => announce("Link copied."), (error) => announce(error.message)),
  };
}

function buttons(result, commands, page) {
  const { run, index, url } = result;
  const { requestId, endpoint, input } = run.request;
  const name = imageFiles.fileName(input.prompt, seedOf(run.seed, index), url);
  const star = button("Favourite", commands.f);
  star.setAttribute("aria-pressed", String(favourites.has(requestId, index)));
  const strength = page.config.strength.includes(endpoint) ? [button("Vary strength", commands.strength, { title: "Up to three more, with neighbouring strengths" })] : [];
  const inputs = page.config.image_to_image.length ? [button("Use as input", commands.input)] : [];
  const repaint = targets.inpaintingFor(page.config, endpoint) ? [button("Repaint a part", commands.r)] : [];
  return element(
    "div", { className: "actions" },
    button("3 variations", commands.v, { title: "Three more images, with neighbouring seeds" }), ...strength, ...repaint, ...inputs,
    button("Use these settings", commands.s), button("Show code", commands.code), star, button("Compare", commands.c),
    element("a", { className: "button", href: url, download: name, textContent: "Download" }),
    button("Copy image", commands.copy), button("Copy link", commands.copyLink), button("Delete", commands.Delete),
  );
}

// A list of every image input of every endpoint, and a button that sends the image there.
function sendForm(result, page, close) {
  const select = element("select", { ariaLabel: "Send to" });
  let group = null;
  for (const { endpoint, path } of targets.all(page.config)) {
    if (group?.label !== endpoint) select.append((group = element("optgroup", { label: endpoint })));
    group.append(element("option", { value: `${endpoint} ${path}`, textContent: path.split(".").map(labelOf).join(": ") }));
  }
  const send = button("Send", () => {
    const [endpoint, path] = select.value.split(" ");
    close();
    page.useAsInput(result.url, endpoint, path, result.run.request.input.prompt);
  });
  return element("div", { className: "row send", hidden: !select.options.length }, "Send to", select, send);
}

function keyList() {
  const rows = KEYS.flatMap(([key, meaning]) => [element("dt", {}, element("kbd", { textContent: key })), element("dd", { textContent: meaning })]);
  return element("details", { className: "keys" }, element("summary", { textContent: "Keys" }), element("dl", {}, ...rows));
}
