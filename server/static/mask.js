// A dialog to draw a mask over an image with a brush, by mouse, pen, finger or keyboard.

import { announce, button, element, loadDialogStyle, modal } from "./elements.js";
import { load, toPng } from "./image_files.js";
import { MaskDrawing } from "./mask_drawing.js";

const HELP = "Draw over the part to change. Keys: arrows move the brush, Space puts it down or lifts it, [ and ] change its size,"
  + " E erases, I inverts, Ctrl+Z undoes, Enter uses the mask.";

// Open the dialog over the image at `url`, with an earlier mask if there is one. Returns the mask as a PNG file, white
// where it was drawn, or null if the user cancelled.
export async function drawMask(url, earlierMask) {
  await loadDialogStyle();
  const image = await load(url);
  const { naturalWidth: width, naturalHeight: height } = image;
  const canvas = element("canvas", { width, height, tabIndex: 0 });
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "Mask over the image");
  canvas.setAttribute("aria-describedby", "mask-help");
  const drawing = new MaskDrawing(canvas);
  if (earlierMask) await load(earlierMask).then((mask) => drawing.add("image", { image: mask }), () => null);
  const brush = brushFor(canvas, drawing);
  const tools = toolbar(drawing, brush);
  const use = button("Use mask", () => (drawing.isEmpty ? warn("The mask is empty: draw over the part to change.") : dialog.close("use")), { className: "main" });
  const problem = element("p");
  problem.setAttribute("role", "alert");
  const warn = (message) => (problem.textContent = message);
  image.alt = "";
  const stage = element("div", { className: "stage" }, image, canvas, brush.node);
  stage.style.setProperty("--ratio", width / height);
  const dialog = modal(
    "mask", "Draw a mask", tools.node, stage, problem,
    element("p", { id: "mask-help", textContent: HELP }), element("div", { className: "actions" }, use, button("Cancel", () => dialog.close())),
  );
  canvas.focus();
  canvas.addEventListener("keydown", (event) => onKey(event, { brush, tools, use }));
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use") return null;
  return new File([await toPng(drawing.toBlackAndWhite())], "mask.png", { type: "image/png" });
}

// The brush: its place and size in pixels of the image, and a circle that shows them.
function brushFor(canvas, drawing) {
  const node = element("span", { className: "brush" });
  const longest = Math.max(canvas.width, canvas.height);
  const brush = { node, size: Math.round(longest / 12), longest, isEraser: false, isDown: false, x: canvas.width / 2, y: canvas.height / 2 };
  const show = () => {
    const { left, top, width } = canvas.getBoundingClientRect();
    const { left: stageLeft, top: stageTop } = canvas.parentElement.getBoundingClientRect();
    const scale = width / canvas.width;
    Object.assign(node.style, {
      left: `${left - stageLeft + brush.x * scale}px`, top: `${top - stageTop + brush.y * scale}px`,
      width: `${brush.size * scale}px`, height: `${brush.size * scale}px`,
    });
    node.classList.toggle("down", brush.isDown);
  };
  brush.resize = (size) => {
    brush.size = Math.min(Math.max(1, Math.round(size)), longest);
    show();
  };
  brush.move = (x, y) => {
    [brush.x, brush.y] = [Math.min(Math.max(0, x), canvas.width), Math.min(Math.max(0, y), canvas.height)];
    if (brush.isDown) drawing.extend({ x: brush.x, y: brush.y });
    show();
  };
  brush.press = (isDown) => {
    if (isDown && !brush.isDown) drawing.start({ x: brush.x, y: brush.y }, brush.size, brush.isEraser);
    brush.isDown = isDown;
    show();
  };
  followPointer(canvas, brush);
  new ResizeObserver(show).observe(canvas);
  return brush;
}

function followPointer(canvas, brush) {
  const moveTo = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    brush.move(((clientX - left) * canvas.width) / width, ((clientY - top) * canvas.height) / height);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    brush.press(false);
    moveTo(event);
    brush.press(true);
  });
  // A fast pointer moves several times between two frames.
  canvas.addEventListener("pointermove", (event) => (event.getCoalescedEvents?.() ?? []).concat(event).forEach(moveTo));
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => brush.press(false));
}

function toolbar(drawing, brush) {
  const size = element("input", { type: "range", min: 1, max: brush.longest / 2, value: brush.size, ariaLabel: "Brush size" });
  size.addEventListener("input", () => brush.resize(Number(size.value)));
  const tools = {
    resize: (factor) => {
      brush.resize(brush.size * factor + (factor > 1 ? 1 : 0));
      size.value = brush.size;
    },
    erase: () => {
      brush.press(false);
      brush.isEraser = !brush.isEraser;
      erase.setAttribute("aria-pressed", String(brush.isEraser));
      announce(brush.isEraser ? "The brush erases." : "The brush draws.");
    },
    invert: () => { drawing.add("invert"); announce("Inverted."); },
    clear: () => drawing.add("clear"),
    undo: () => { brush.press(false); announce(drawing.undo() ? "Undone." : "Nothing to undo."); },
  };
  const erase = button("Erase", tools.erase);
  erase.setAttribute("aria-pressed", "false");
  tools.node = element(
    "div", { className: "row" }, element("label", {}, "Size ", size), erase,
    button("Invert", tools.invert), button("Undo", tools.undo), button("Clear", tools.clear),
  );
  return tools;
}

function onKey(event, { brush, tools, use }) {
  const step = Math.max(2, brush.size / 4);
  const move = (x, y) => () => brush.move(brush.x + x * step, brush.y + y * step);
  const commands = {
    ArrowLeft: move(-1, 0), ArrowRight: move(1, 0), ArrowUp: move(0, -1), ArrowDown: move(0, 1),
    "[": () => tools.resize(0.8), "]": () => tools.resize(1.25), e: tools.erase, i: tools.invert, Enter: () => use.click(),
    " ": () => {
      brush.press(!brush.isDown);
      announce(brush.isDown ? "The brush is down." : "The brush is lifted.");
    },
  };
  const isUndo = (event.ctrlKey || event.metaKey) && event.key === "z";
  const command = isUndo ? tools.undo : !event.ctrlKey && !event.metaKey && !event.altKey && commands[event.key];
  if (!command) return;
  event.preventDefault();
  command();
}
