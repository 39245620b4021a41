// Swagger UI for this server's OpenAPI document, with names and colours that everybody can read.

// Swagger UI puts a link to each operation into the button that opens it, where screen readers do not find it.
const withoutLinks = (Original, { React }) => ({ text }) => React.createElement("span", null, text);

const root = document.getElementById("swagger-ui");

// Names of what Swagger UI does not name, by selector; the first that fits is taken.
const NAMES = { ".close-modal": "Close", ".auth-container input": "Key", "#servers": "Server", select: "Media type", textarea: "Request body" };

function nameOf(node) {
  const { paramName, propertyName } = node.closest("[data-param-name], [data-property-name]")?.dataset ?? {};
  return paramName ?? propertyName ?? NAMES[Object.keys(NAMES).find((selector) => node.matches(selector))];
}

new MutationObserver(() => {
  for (const node of root.querySelectorAll(`:is(${Object.keys(NAMES)}):not([aria-label])`)) {
    node.setAttribute("aria-label", nameOf(node));
  }
  // These buttons have other names than their texts.
  for (const button of root.querySelectorAll(".auth-btn-wrapper [aria-label]")) button.removeAttribute("aria-label");
  // Examples scroll, so the keyboard must reach them.
  for (const example of root.querySelectorAll(".highlight-code > :not([tabindex])")) example.tabIndex = 0;
}).observe(root, { childList: true, subtree: true });

globalThis.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  plugins: [{ wrapComponents: { DeepLink: withoutLinks } }],
  // By default Swagger UI sends the document's URL to a public validator.
  validatorUrl: null,
});
