// The code tab: a request as programs, one for each language.

import { announce, button, element } from "./elements.js";
import { copyText } from "./image_files.js";
import { programs } from "./programs.js";
import * as tabs from "./tabs.js";

const KEY = "language";

// Fill the container with programs. `note` is the text and buttons above them; `sample` holds the arguments of `programs`.
export function show(container, note, ...sample) {
  const list = element("div", { className: "tabs", ariaLabel: "Language" });
  list.setAttribute("role", "tablist");
  const sections = Object.entries(programs(...sample)).map(([language, text], place) => {
    const id = `code-${place}`;
    const tab = element("button", { type: "button", id: `tab-${id}`, textContent: language });
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", id);
    list.append(tab);
    return section(id, language, text);
  });
  container.replaceChildren(...(note.length ? [element("p", {}, ...note)] : []), list, ...sections);
  const choose = tabs.start(list, (tab) => localStorage.setItem(KEY, tab.textContent));
  choose([...list.children].find((tab) => tab.textContent === localStorage.getItem(KEY)) ?? list.firstChild);
}

function section(id, language, text) {
  const copy = button("Copy", () =>
    copyText(text).then(() => announce("Copied."), (error) => announce(error.message)));
  const code = element("pre", { tabIndex: 0, textContent: text });
  code.dataset.language = language;
  const node = element("section", { id }, copy, code);
  node.setAttribute("role", "tabpanel");
  node.setAttribute("aria-labelledby", `tab-${id}`);
  return node;
}
