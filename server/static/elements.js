// Functions that create elements, buttons and icons.

export const byId = (id) => document.getElementById(id);

export const element = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

export const button = (label, action, attributes = {}) => {
  const node = element("button", { type: "button", textContent: label, ...attributes });
  if (action) node.addEventListener("click", action);
  return node;
};

// A button that shows images which the safety checker flagged, and blurs them again.
export function blurButton(...images) {
  const show = button("Show", () => {
    for (const image of images) show.textContent = image.classList.toggle("flagged") ? "Show" : "Blur";
  });
  return show;
}

// Outlines on a grid of 24 by 24.
const ICONS = {
  star: "M12 3l2.8 5.9 6.2.8-4.6 4.4 1.2 6.4L12 17.4l-5.6 3.1 1.2-6.4L3 9.7l6.2-.8z",
  compare: "M3 5h18v14H3zM12 3v18M7 9l-2 3 2 3M17 9l2 3-2 3",
  input: "M13 4h7v16h-7M3 12h11M10 8l4 4-4 4",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  close: "M5 5l14 14M19 5L5 19",
  previous: "M15 4l-8 8 8 8",
  next: "M9 4l8 8-8 8",
};

// A button that shows an icon. Its label is read by screen readers and shown as a tooltip.
export function iconButton(icon, label, action) {
  const node = button("", action, { className: "icon", title: label, ariaLabel: label });
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS(svg.namespaceURI, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  node.append(svg);
  return node;
}

const ANNOUNCEMENT_MS = 5000;

// Say what happened, to screen readers and, unless the page shows it elsewhere, in a corner of the window, without
// moving the focus.
export function announce(message, isShown = true) {
  const region = [...document.querySelectorAll("dialog[open] .announcement")].at(-1) ?? byId("announcement");
  region.textContent = message;
  region.classList.toggle("shown", isShown && message !== "");
  clearTimeout(region.timer);
  region.timer = setTimeout(() => region.classList.remove("shown"), ANNOUNCEMENT_MS);
}

// A modal dialog with a heading and a button that closes it. It is removed from the page when it closes.
export function modal(className, title, ...children) {
  const heading = element("h2", { id: `${className}-title`, textContent: title });
  const dialog = element("dialog", { className });
  const bar = element("header", {}, heading, iconButton("close", "Close", () => dialog.close()));
  const announcement = element("p", { className: "announcement" });
  announcement.setAttribute("role", "status");
  dialog.append(bar, ...children, announcement);
  dialog.setAttribute("aria-labelledby", heading.id);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

// Load the style of the dialogs over the whole window, once.
let dialogStyle;
export const loadDialogStyle = () => (dialogStyle ??= new Promise((resolve, reject) => {
  const link = element("link", { rel: "stylesheet", href: new URL("dialogs.css", import.meta.url).href, onload: resolve });
  link.onerror = () => {
    dialogStyle = undefined;
    reject(new Error("The server cannot be reached. Try again when it runs."));
  };
  document.head.append(link);
}));

// Ask whether to do something that cannot be undone. Returns the answer.
export async function confirm(title, text, action) {
  const cancel = button("Cancel", () => dialog.close());
  const row = element("div", { className: "actions" }, button(action, () => dialog.close("yes"), { className: "main" }), cancel);
  const dialog = modal("confirm", title, element("p", { textContent: text }), row);
  cancel.focus();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}
