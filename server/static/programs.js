// A request as programs to copy and run. Each sends its request to this server.

import { sizeText } from "./labels.js";

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const javascript = (value) => JSON.stringify(value, null, 2);
const python = (value) =>
  JSON.stringify(value, null, 4).replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (_, text, word) =>
    text ?? { true: "True", false: "False", null: "None" }[word]);
// Indent all lines but the first.
const indent = (text, by) => text.replaceAll("\n", `\n${" ".repeat(by)}`);

// Return the programs by name. `site` is { url, needsKey }. The programs for OpenAI's packages are left out if the
// endpoint needs an image, which these packages would have to upload.
export function programs(endpoint, input, site, takesImage) {
  return {
    curl: curl(endpoint, input, site),
    Python: pythonClient(endpoint, input),
    JavaScript: javascriptClient(endpoint, input, site),
    ...(!takesImage && "prompt" in input && {
      "OpenAI, Python": openaiPython(endpoint, input, site),
      "OpenAI, JavaScript": openaiJavascript(endpoint, input, site),
    }),
    "Test fixture, pytest": pytestFixture(endpoint, input),
    "Test fixture, Node": nodeFixture(endpoint, input),
  };
}

const curl = (endpoint, input, { url, needsKey }) => {
  const authorization = needsKey ? ` \\\n  -H "Authorization: Key $FAL_KEY"` : "";
  return `curl ${url}/${endpoint}${authorization} \\
  -H 'Content-Type: application/json' \\
  -d ${shell(javascript(input))}
`;
};

const pythonClient = (endpoint, input) => `# First, in the shell: pip install fal-client && eval "$(flux-server env)"
import fal_client

result = fal_client.subscribe(
    ${JSON.stringify(endpoint)},
    arguments=${indent(python(input), 4)},
)
print(result["images"][0]["url"])
`;

const javascriptClient = (endpoint, input, { url, needsKey }) => `// npm install @fal-ai/client
import { fal } from "@fal-ai/client";

fal.config({ ${needsKey ? "credentials: process.env.FAL_KEY, " : ""}proxyUrl: { url: ${JSON.stringify(`${url}/api/fal/proxy`)}, when: "always" } });
const result = await fal.subscribe(${JSON.stringify(endpoint)}, {
  input: ${indent(javascript(input), 2)},
});
console.log(result.data.images[0].url);
`;

// OpenAI's names of the fields, and the fields that only the endpoint has.
function openaiFields(endpoint, { prompt, image_size: size, num_images: n, sync_mode: _, ...others }) {
  const named = { model: endpoint, prompt };
  if (size) named.size = sizeText(size);
  if (n !== undefined) named.n = n;
  return [named, others];
}

function openaiPython(endpoint, input, { url, needsKey }) {
  const [named, others] = openaiFields(endpoint, input);
  const lines = Object.entries(named).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  return `# pip install openai
import os

import openai

client = openai.OpenAI(base_url=${JSON.stringify(`${url}/v1`)}, api_key=${needsKey ? `os.environ["FAL_KEY"]` : `os.environ.get("FAL_KEY", "local")`})
result = client.images.generate(
${lines}    response_format="url",
    extra_body=${indent(python(others), 4)},
)
print(result.data[0].url)
`;
}

function openaiJavascript(endpoint, input, { url, needsKey }) {
  const [named, others] = openaiFields(endpoint, input);
  return `// npm install openai
import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${JSON.stringify(`${url}/v1`)}, apiKey: process.env.FAL_KEY${needsKey ? "" : ` ?? "local"`} });
const result = await client.images.generate(${javascript({ ...named, response_format: "url", ...others })});
console.log(result.data[0].url);
`;
}

const pytestFixture = (endpoint, input) => `# For CI: flux-server run --testing -- pytest
# The fixture is a real server with small demo weights. docs/testing-your-app.md lists what it can do.
import fal_client
import pytest


def draw():
    """Stand for your application, which calls fal's client as always."""
    return fal_client.subscribe(
        ${JSON.stringify(endpoint)},
        arguments=${indent(python(input), 8)},
    )


def test_the_image_is_drawn(fal_server):
    assert draw()["images"][0]["url"]
    (request,) = fal_server.requests
    assert request.endpoint == ${JSON.stringify(endpoint)}


def test_a_failure_is_noticed(fal_server):
    fal_server.fail_next(500)
    with pytest.raises(Exception):
        draw()
`;

const nodeFixture = (endpoint, input) => `// For CI: flux-server run --testing -- node --test
// The command starts a real server with small demo weights. docs/testing-your-app.md lists what it can do.
import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";
import { fal } from "@fal-ai/client";

const controls = \`\${process.env.FAL_SERVER_URL}/testing\`;
const headers = { authorization: \`Key \${process.env.FAL_KEY}\` };
// Stands for your application, which calls fal's client as always.
const draw = () => fal.subscribe(${JSON.stringify(endpoint)}, {
  input: ${indent(javascript(input), 2)},
});

beforeEach(() => fetch(\`\${controls}/reset\`, { method: "POST", headers }));

test("the image is drawn", async () => {
  assert.ok((await draw()).data.images[0].url);
  const { requests } = await (await fetch(\`\${controls}/requests\`, { headers })).json();
  assert.equal(requests[0].endpoint, ${JSON.stringify(endpoint)});
});

test("a failure is noticed", async () => {
  await fetch(\`\${controls}/next\`, { method: "POST", headers, body: JSON.stringify({ status: 500 }) });
  await assert.rejects(draw());
});
`;
