// The current form as programs to copy and run. Each program sends its request to this server.

import { element } from "./elements.js";

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const python = (value) =>
  JSON.stringify(value, null, 4).replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (_, text, word) =>
    text ?? { true: "True", false: "False", null: "None" }[word]);

export function programs(endpoint, input, { url, needsKey }) {
  const authorization = needsKey ? ` \\\n  -H "Authorization: Key $FAL_KEY"` : "";
  return {
    curl: `curl ${url}/${endpoint}${authorization} \\\n  -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(input))}\n`,
    Python: `# First, in the shell: pip install fal-client && eval "$(flux-server env)"\nimport fal_client\n\nresult = fal_client.subscribe(\n    ${JSON.stringify(endpoint)},\n    arguments=${python(input).replaceAll("\n", "\n    ")},\n)\nprint(result["images"][0]["url"])\n`,
    JavaScript: `// npm install @fal-ai/client\nimport { fal } from "@fal-ai/client";\n\nfal.config({ ${needsKey ? "credentials: process.env.FAL_KEY, " : ""}proxyUrl: { url: ${JSON.stringify(`${url}/api/fal/proxy`)}, when: "always" } });\nconst result = await fal.subscribe(${JSON.stringify(endpoint)}, {\n  input: ${JSON.stringify(input, null, 2).replaceAll("\n", "\n  ")},\n});\nconsole.log(result.data.images[0].url);\n`,
  };
}

export function show(container, ...sample) {
  const blocks = Object.entries(programs(...sample)).map(([language, text]) => {
    const copy = element("button", { type: "button", textContent: "Copy" });
    copy.addEventListener("click", () => navigator.clipboard.writeText(text));
    const code = element("pre", { tabIndex: 0, textContent: text });
    code.dataset.language = language;
    return element("section", {}, element("h2", { textContent: language }), copy, code);
  });
  container.replaceChildren(...blocks);
}
