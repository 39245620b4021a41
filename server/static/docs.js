// Swagger UI for this server's OpenAPI document, with names and colours that everybody can read.

// Swagger UI puts a link to each operation into the button that opens it, where screen readers do not find it.
const withoutLinks = (Original, { React }) => ({ text }) => React.createElement("span", null, text);

const root = document.getElementById("swagger-ui");

// Swagger UI names no list of choices, and the keyboard does not reach its examples, which scroll.
new MutationObserver(() => {
  for (const select of root.querySelectorAll("select:not([aria-label])")) {
    const row = select.closest("[data-param-name]");
    select.setAttribute("aria-label", row?.dataset.paramName ?? (select.id === "servers" ? "Server" : "Media type"));
  }
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
