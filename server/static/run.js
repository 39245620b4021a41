// One request on the page: its place in the queue, its steps, its preview, then its pictures.

import * as api from "./api.js";
import { element } from "./form.js";

const button = (words, act) => {
  const made = element("button", { type: "button", textContent: words });
  made.addEventListener("click", act);
  return made;
};

export class Run {
  constructor(started, { use, paintOver, forgotten, told }) {
    this.started = started;
    this.paintOver = paintOver;
    this.told = told;
    this.words = element("p", { className: "state", textContent: "sending…" });
    this.words.setAttribute("role", "status");
    this.bar = element("progress", { max: 1, ariaLabel: "Steps" });
    this.pictures = element("div", { className: "pictures" });
    this.stop = button("Cancel", () => api.cancel(started));
    this.raw = element("pre", { tabIndex: 0 });
    this.logs = element("pre", { tabIndex: 0 });
    const prompt = element("p", { className: "prompt", textContent: started.input.prompt ?? "" });
    const actions = element(
      "div", { className: "actions" }, this.stop,
      button("Use these settings", () => use(started.endpoint, this.settings())),
      button("Forget", () => this.forget(forgotten)),
    );
    const more = element(
      "details", {}, element("summary", { textContent: "Request, answer, log" }),
      element("pre", { tabIndex: 0, textContent: `${started.endpoint}\n${JSON.stringify(started.input, null, 2)}` }), this.raw, this.logs,
    );
    const when = element("time", { dateTime: new Date(started.startedAt).toISOString(), textContent: new Date(started.startedAt).toLocaleString() });
    this.node = element("li", { className: "run" }, prompt, when, this.words, this.bar, this.pictures, actions, more);
    this.node.dataset.requestId = started.requestId;
  }

  // What gives the same pictures again: a seed that was left to the server is known once it answered.
  settings() {
    return { ...this.started.input, seed: this.seed ?? this.started.input.seed };
  }

  async follow() {
    for await (const status of api.statuses(this.started)) this.tell(status);
    try {
      this.finish(await api.result(this.started));
    } catch (error) {
      this.fail(error);
    }
  }

  tell({ status, queue_position: position, logs, preview }) {
    this.node.dataset.status = status;
    if (logs) this.logs.textContent = logs.map(({ message }) => message).join("\n");
    for (const { message } of logs ?? []) {
      const step = /^step (\d+)\/(\d+)$/.exec(message);
      if (step) [this.bar.value, this.bar.max] = [Number(step[1]), Number(step[2])];
    }
    if (preview) this.preview(preview);
    const ahead = position === 1 ? "1 request ahead" : `${position} requests ahead`;
    const words = {
      IN_QUEUE: position ? `waiting, ${ahead}` : "next in line",
      IN_PROGRESS: this.bar.position >= 0 ? `step ${this.bar.value} of ${this.bar.max}` : "begun",
      COMPLETED: "done",
      UNREACHABLE: "the server cannot be reached; trying again",
    };
    this.words.textContent = words[status];
  }

  preview(url) {
    this.pictures.replaceChildren(element("img", { src: url, alt: "How it looks so far", className: "preview" }));
  }

  finish(output) {
    const seconds = output.timings?.inference;
    this.seed = output.seed;
    this.node.dataset.status = "COMPLETED";
    this.told(output.seed);
    this.ended(`seed ${output.seed}${seconds === undefined ? "" : `, ${seconds.toFixed(2)} s`}`);
    this.raw.textContent = JSON.stringify(output, null, 2);
    this.pictures.replaceChildren(
      ...output.images.map(({ url, width, height }, place) => this.picture(api.here(url), width, height, output.has_nsfw_concepts[place])),
    );
  }

  picture(url, width, height, isFlagged) {
    const image = element("img", { src: url, width, height, alt: this.started.input.prompt ?? "", className: isFlagged ? "flagged" : "" });
    image.addEventListener("error", () => image.replaceWith("This picture is not kept any more, or is its owner's alone."));
    const link = element("a", { href: url, textContent: "Download", download: "" });
    const copy = button("Copy link", () => navigator.clipboard.writeText(url));
    const caption = element("figcaption", {}, isFlagged ? "Flagged by the safety checker. " : "", link, copy);
    if (this.paintOver) caption.append(button("Use as input", () => this.paintOver(url)));
    if (isFlagged) caption.append(button("Show", (event) => {
      event.target.textContent = image.classList.toggle("flagged") ? "Show" : "Blur";
    }));
    return element("figure", {}, image, caption);
  }

  fail(error) {
    this.pictures.replaceChildren();
    this.ended(error.status === 404 ? "The server has forgotten this request." : error.message);
    if (error.body) this.raw.textContent = JSON.stringify(error.body, null, 2);
    this.node.dataset.status = "FAILED";
  }

  ended(words) {
    this.words.textContent = words;
    this.bar.hidden = this.stop.hidden = true;
    this.isOver = true;
    if (this.isForgotten) api.forget(this.started);
  }

  // From the page, and from the server with its pictures: at once, or when it has stopped.
  async forget(forgotten) {
    this.isForgotten = true;
    this.node.remove();
    forgotten();
    await (this.isOver ? api.forget(this.started) : api.cancel(this.started));
  }
}
