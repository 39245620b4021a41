// One request on the page: its position in the queue, its steps and preview, then its images.

import * as api from "./api.js";
import { element } from "./form.js";

const button = (label, action) => {
  const node = element("button", { type: "button", textContent: label });
  node.addEventListener("click", action);
  return node;
};

export class Run {
  constructor(request, { useSettings, useAsInput, onSeed, onDelete }) {
    this.request = request;
    this.useAsInput = useAsInput;
    this.onSeed = onSeed;
    this.onDelete = onDelete;
    this.state = element("p", { className: "state", textContent: "Sending…" });
    this.state.setAttribute("role", "status");
    this.bar = element("progress", { max: 1, ariaLabel: "Steps" });
    this.images = element("div", { className: "images" });
    this.cancel = button("Cancel", () => api.cancel(request));
    this.raw = element("pre", { tabIndex: 0 });
    this.logs = element("pre", { tabIndex: 0 });
    const prompt = element("p", { className: "prompt", textContent: request.input.prompt ?? "" });
    const actions = element(
      "div", { className: "actions" }, this.cancel,
      button("Use these settings", () => useSettings(request.endpoint, this.settings())),
      button("Delete", () => this.delete()),
    );
    const more = element(
      "details", {}, element("summary", { textContent: "Request, response and logs" }),
      element("pre", { tabIndex: 0, textContent: `${request.endpoint}\n${JSON.stringify(request.input, null, 2)}` }), this.raw, this.logs,
    );
    const startedAt = new Date(request.startedAt);
    const time = element("time", { dateTime: startedAt.toISOString(), textContent: startedAt.toLocaleString() });
    this.node = element("li", { className: "run" }, prompt, time, this.state, this.bar, this.images, actions, more);
    this.node.dataset.requestId = request.requestId;
  }

  // Return the input that reproduces the images. A seed that the server chose is known once the request completes.
  settings() {
    return { ...this.request.input, seed: this.seed ?? this.request.input.seed };
  }

  async follow() {
    for await (const status of api.statuses(this.request)) this.update(status);
    try {
      this.finish(await api.result(this.request));
    } catch (error) {
      this.fail(error);
    }
  }

  update({ status, queue_position: position, logs, preview }) {
    this.node.dataset.status = status;
    if (logs) this.logs.textContent = logs.map(({ message }) => message).join("\n");
    for (const { message } of logs ?? []) {
      const step = /^step (\d+)\/(\d+)$/.exec(message);
      if (step) [this.bar.value, this.bar.max] = [Number(step[1]), Number(step[2])];
    }
    if (preview) this.showPreview(preview);
    const ahead = position === 1 ? "1 request ahead" : `${position} requests ahead`;
    const labels = {
      IN_QUEUE: position ? `Waiting, ${ahead}` : "Next in queue",
      IN_PROGRESS: this.bar.position >= 0 ? `Step ${this.bar.value} of ${this.bar.max}` : "Generating…",
      COMPLETED: "Done",
      UNREACHABLE: "Cannot reach the server, retrying…",
    };
    this.state.textContent = labels[status];
  }

  showPreview(url) {
    this.images.replaceChildren(element("img", { src: url, alt: "Preview", className: "preview" }));
  }

  finish(output) {
    const seconds = output.timings?.inference;
    this.seed = output.seed;
    this.node.dataset.status = "COMPLETED";
    this.onSeed(output.seed);
    this.end(`Seed ${output.seed}${seconds === undefined ? "" : `, ${seconds.toFixed(2)} s`}`);
    this.raw.textContent = JSON.stringify(output, null, 2);
    this.images.replaceChildren(
      ...output.images.map(({ url, width, height }, index) => this.figure(api.localUrl(url), width, height, output.has_nsfw_concepts[index])),
    );
  }

  figure(url, width, height, isFlagged) {
    const image = element("img", { src: url, width, height, alt: this.request.input.prompt ?? "", className: isFlagged ? "flagged" : "" });
    image.addEventListener("error", () => image.replaceWith("This image is no longer stored, or only its owner can view it."));
    const link = element("a", { href: url, textContent: "Download", download: "" });
    const copy = button("Copy link", () => navigator.clipboard.writeText(url));
    const caption = element("figcaption", {}, isFlagged ? "Flagged by the safety checker. " : "", link, copy);
    if (this.useAsInput) caption.append(button("Use as input", () => this.useAsInput(url)));
    if (isFlagged) caption.append(button("Show", (event) => {
      event.target.textContent = image.classList.toggle("flagged") ? "Show" : "Blur";
    }));
    return element("figure", {}, image, caption);
  }

  fail(error) {
    this.images.replaceChildren();
    this.end(error.status === 404 ? "The server no longer stores this request." : error.message);
    if (error.body) this.raw.textContent = JSON.stringify(error.body, null, 2);
    this.node.dataset.status = "FAILED";
  }

  end(state) {
    this.state.textContent = state;
    this.bar.hidden = this.cancel.hidden = true;
    this.isDone = true;
    if (this.isDeleted) api.deleteRequest(this.request);
  }

  // Remove the request from the page and, with its images, from the server. A running request is cancelled first.
  async delete() {
    this.isDeleted = true;
    this.node.remove();
    this.onDelete();
    await (this.isDone ? api.deleteRequest(this.request) : api.cancel(this.request));
  }
}
