// Two results on top of each other, with a slider that uncovers one or the other, and the parameters in which they differ.

import { blurButton, button, element, loadDialogStyle, modal } from "./elements.js";
import { differences } from "./parameters.js";

export async function open(left, right) {
  await loadDialogStyle();
  const slider = element("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50, ariaLabel: "How much of the left image is shown, in percent" });
  const images = [left, right].map(({ run, url, width, height, isFlagged }) => element("img", { src: url, width, height, alt: run.request.input.prompt ?? "", draggable: false, className: isFlagged ? "flagged" : "" }));
  images[0].classList.add("left");
  const flagged = images.filter((image) => image.classList.contains("flagged"));
  const stage = element("div", { className: "pair" }, images[1], images[0], slider, element("span", { className: "line" }));
  stage.style.aspectRatio = `${left.width ?? 1} / ${left.height ?? 1}`;
  const show = () => stage.style.setProperty("--shown", `${slider.value}%`);
  const drag = (event) => {
    const { left: start, width } = stage.getBoundingClientRect();
    slider.value = (100 * (event.clientX - start)) / width;
    show();
  };
  stage.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    slider.focus();
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", (event) => stage.hasPointerCapture(event.pointerId) && drag(event));
  slider.addEventListener("input", show);
  const table = element("table");
  const swap = button("Swap", () => {
    dialog.close();
    open(right, left);
  });
  const dialog = modal("compare", "Compare", element("div", { className: "view" }, stage), element("div", { className: "actions" }, swap, ...(flagged.length ? ["Flagged by the safety checker. ", blurButton(...flagged)] : [])), table);
  fill(table, differences(left, right));
  show();
  slider.focus();
}

function fill(table, rows) {
  const head = ["Parameter", "Left", "Right"].map((label) => element("th", { scope: "col", textContent: label }));
  const body = rows.map(([name, ...values]) =>
    element("tr", {}, element("th", { scope: "row", textContent: name }), ...values.map((value) => element("td", { textContent: value }))));
  table.append(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}
