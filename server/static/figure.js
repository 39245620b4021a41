// One image in the grid, with the buttons for a favourite, for a comparison and for its use as an input.

import { blurButton, element, iconButton } from "./elements.js";
import * as favourites from "./favourites.js";
import { setDragged } from "./image_files.js";

// `result` is { run, index, url, width, height, isFlagged }. `actions` are the functions that the buttons call:
// { open(result), compare(result), toggleFavourite(result), useAsInput(result) or null, onMissing(result) }.
export function figure(result, actions) {
  const { run, url, width, height, isFlagged } = result;
  const alt = run.request.input.prompt ?? "";
  const image = element("img", { src: url, width, height, alt, loading: "lazy", className: isFlagged ? "flagged" : "" });
  // A link, so that a middle click opens the file in a tab. A click opens the lightbox.
  const link = element("a", { className: "open", href: url, draggable: true }, image);
  if (!alt) link.setAttribute("aria-label", "Open the image");
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    actions.open(result);
  });
  link.addEventListener("dragstart", (event) => setDragged(event.dataTransfer, url));
  image.addEventListener("error", () => {
    run.results = run.results.filter((each) => each !== result);
    actions.onMissing(result);
    result.node.replaceChildren("This image is no longer stored, or only its owner can view it.");
  });
  const tools = element("div", { className: "tools" }, favouriteButton(result, actions), compareButton(result, actions));
  if (actions.useAsInput) tools.append(iconButton("input", "Use as input", () => actions.useAsInput(result)));
  result.node = element("figure", {}, link, tools);
  showFavourite(result);
  if (isFlagged) result.node.append(flaggedCaption(image));
  return result.node;
}

function flaggedCaption(image) {
  return element("figcaption", {}, "Flagged by the safety checker. ", blurButton(image));
}

function favouriteButton(result, actions) {
  result.star = iconButton("star", "Favourite", () => actions.toggleFavourite(result));
  return result.star;
}

// Show whether the image is a favourite.
export function showFavourite(result) {
  const isMarked = favourites.has(result.run.request.requestId, result.index);
  result.star.setAttribute("aria-pressed", String(isMarked));
  result.node?.classList.toggle("favourite", isMarked);
}

function compareButton(result, actions) {
  const node = iconButton("compare", "Compare", () => actions.compare(result));
  node.setAttribute("aria-pressed", "false");
  result.compareButton = node;
  return node;
}
